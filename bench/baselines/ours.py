"""What a search of the engine takes, measured as that of a baseline."""

import time

import numpy as np

from tts_engine.engine import Engine
from tts_engine.results import SearchResult
from tts_engine.runner import ModelRunner

from .lockstep import Spent, Task


class Ours:
    """An engine whose forwards and ticks are watched."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.spent = engine, Spent()
        self._watch_kv(engine.policy.runner, "policy_kv_bytes")
        self._watch_clock(engine.policy, "tick", "policy_seconds")
        if engine.scorer is not None:
            self._watch_kv(engine.scorer.runner, "prm_kv_bytes")
            for verb in ("start", "finish"):
                self._watch_clock(engine.scorer, verb, "prm_seconds")

    def search(self, task: Task) -> tuple[SearchResult, Spent]:
        """From nothing: no keys and values of an earlier search are there."""
        spent = self.spent = Spent()
        self.engine.forget()
        [result] = self.engine.search(task.problem, task.method, seed=task.seed)
        policy, prm = result.ledger.policy, result.ledger.prm
        spent.tokens_drawn, spent.steps_scored = policy.tokens_generated, prm.steps_scored
        spent.policy_tokens, spent.prm_tokens = policy.tokens_computed, prm.tokens_computed
        spent.nodes = result.nodes
        return result, spent

    def _watch_kv(self, runner: ModelRunner, name: str) -> None:
        """Blocks that are needed while a forward runs: those being written and those that somebody reads."""
        forward = runner.forward

        def watched(segments, read_at):
            self._note_kv(runner, name)
            return forward(segments, read_at)

        runner.forward = watched  # type: ignore[method-assign]

    def _note_kv(self, runner: ModelRunner, name: str) -> None:
        counts = runner.tree.counts()
        setattr(self.spent, name, max(getattr(self.spent, name), (counts.filling + counts.pinned) * runner.block_bytes))

    def _watch_clock(self, model, verb: str, name: str) -> None:
        run = getattr(model, verb)

        def watched():
            self._note_kv(model.runner, name.replace("seconds", "kv_bytes"))  # what ticks that are under way have room for
            began = time.perf_counter()
            run()
            setattr(self.spent, name, getattr(self.spent, name) + time.perf_counter() - began)

        setattr(model, verb, watched)


def read_everything(runner: ModelRunner) -> None:
    """Have a runner compute its last layer for every token, read or not.

    For slices of a model: what is left out there is 1/24 of the whole model, and would be most of a slice.
    """
    forward = runner.forward

    def reading(segments, read_at):
        return forward(segments, np.arange(len(segments.token_ids)))[read_at]

    runner.forward = reading  # type: ignore[method-assign]
