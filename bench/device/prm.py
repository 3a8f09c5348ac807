"""PRM scoring timed: behind what was read before over reading everything anew; its head; how near a forward comes to the chip."""

import random
import string
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from tts_engine.attention import make_backend
from tts_engine.branch import Branch, root_branch
from tts_engine.engine import make_scorer
from tts_engine.ledger import PRMLedger
from tts_engine.models.heads import TwoClassHead
from tts_engine.models.weights import RandomCheckpoint, load_decoder
from tts_engine.prm.scorer import ScoreContext, Scorer
from tts_engine.runner import ModelRunner
from tts_engine.search import Driver
from tts_engine.search.requests import Score

from ..baselines.lockstep import Spent
from ..baselines.models import text_of
from ..baselines.sharing_blind import RereadingPRM
from .race import product_rate, race, raced, seconds_of
from .setting import PAIR_PRM, QWEN_PRM, Bench

OURS, REREAD = "new tokens only", "everything anew, full logits"


class Reading:
    """Branches with a step more a round, each its own: on a problem of so many tokens, each step `step` tokens, marker and all."""

    def __init__(self, scorer: Scorer, candidates: int, opening: int, step: int) -> None:
        self.scorer, self.candidates = scorer, candidates
        spec = scorer.spec
        self._text = step - len(spec.step("", True)), step - len(spec.step("", False))
        assert min(self._text) > 0, f"a step of {step} tokens has no room beside the marker"
        self.root = root_branch((), text_of(max(1, opening - len(spec.opening("a")) + 1)))

    def grown(self, branch: Branch, row: int) -> Branch:
        """The same step for the same row and depth, which no other has."""
        letters = random.Random(f"{row}/{branch.depth}").choices(string.ascii_lowercase, k=self._text[branch.parent is not None])
        text = "".join(letter if i % 2 == 0 else str(ord(letter) % 10) for i, letter in enumerate(letters))
        return Branch(branch, (0,), text, 1 + row + self.candidates * branch.depth)

    def paths(self, depth: int) -> list[list[Branch]]:
        """By round, the branches that it reads."""
        rounds, branches = [], [self.root] * self.candidates
        for _ in range(depth):
            branches = [self.grown(branch, row) for row, branch in enumerate(branches)]
            rounds.append(branches)
        return rounds

    def read(self, depth: int) -> PRMLedger:
        """All rounds from nothing."""

        def program():
            branches = [self.root] * self.candidates
            for _ in range(depth):
                branches = yield Score([self.grown(branch, row) for row, branch in enumerate(branches)])
            return branches

        scorer, driver, ledger = self.scorer, Driver(program()), PRMLedger()
        scorer.runner.tree.evict_all()
        context = ScoreContext(driver=driver, opening=scorer.spec.opening(self.root.text), ledger=ledger, scored=lambda step: None)
        while not driver.done:
            for ask in driver.asks():
                scorer.submit(context, ask)
            while scorer.num_open:
                scorer.tick()
        return ledger


def prm(bench: Bench) -> None:
    sizes = bench.sizes
    checkpoint = RandomCheckpoint(bench.model("prm-pair", sizes.prm, PAIR_PRM))
    decoder = load_decoder(checkpoint, dtype=sizes.dtype, device=bench.device)
    most = max(candidates * (sizes.opening + depth * (sizes.step + 16)) for candidates, depth in sizes.read.items())

    def runner(backend: str, tokens: int) -> ModelRunner:
        return ModelRunner(decoder, make_backend(backend, bench.device), num_blocks=-(-tokens // 16), block_size=16)

    scorer = make_scorer(runner(bench.backend, 2 * most + 4 * sizes.prefill), checkpoint, None)
    blind = RereadingPRM(writes_logits(runner("triton_blind" if bench.on_gpu else "native", 4 * sizes.prefill + most)), scorer)
    forward_and_head(bench, scorer)
    for candidates, depth in sizes.read.items():
        reading, ledgers, spent = Reading(scorer, candidates, sizes.opening, sizes.step), list[PRMLedger](), list[Spent]()

        def anew(reading: Reading = reading, depth: int = depth, spent: list[Spent] = spent) -> None:
            spent.append(Spent())
            for branches in reading.paths(depth):
                blind.read(branches, spent[-1])

        def ours(reading: Reading = reading, depth: int = depth, ledgers: list[PRMLedger] = ledgers) -> None:
            ledgers.append(reading.read(depth))

        ours()
        times = raced(bench, {OURS: ours, REREAD: anew}, slow=True)
        tokens = spent[-1].prm_tokens / ledgers[-1].tokens_computed
        case = f"{candidates} branches, {depth} steps of {sizes.step} on {sizes.opening}"
        for name, seconds in times.seconds.items():
            bench.row(case, contender=name, ms=1e3 * seconds, times_ours=times.ratio(name), token_ratio=tokens, noise=times.noise,
                      rounds=times.rounds)  # fmt: skip
        told = f"{case}: {times.ratio(REREAD):.1f} of {tokens:.1f}"
        bench.figure("reread", told, times.ratio(REREAD) / tokens, noise=times.noise)


def writes_logits(runner: ModelRunner) -> ModelRunner:
    """Have a runner compute the whole vocabulary's logits of every token, as a causal language model's forward does."""
    forward = runner.forward

    def written(segments, read_at):
        hidden = forward(segments, np.arange(len(segments.token_ids)))
        head = runner.decoder.weights.lm_head
        assert head is not None
        head(hidden)
        return hidden[torch.from_numpy(read_at).to(hidden.device)]

    runner.forward = written  # type: ignore[method-assign]
    return runner


def forward_and_head(bench: Bench, scorer: Scorer) -> None:
    """The last round of some branches, as many tokens as one forward takes: its share of what a large product reaches, and what the
    heads add to it."""
    sizes, runner, seen = bench.sizes, scorer.runner, list[tuple[Any, np.ndarray]]()
    forward, rows = runner.forward, sizes.prefill // sizes.step

    def watched(segments, read_at):
        seen.append((segments, read_at))
        return forward(segments, read_at)

    runner.forward = watched  # type: ignore[method-assign]
    reading = Reading(scorer, rows, sizes.opening, sizes.step)
    before, after = (reading.read(depth).flops for depth in (3, 4))
    runner.forward = forward  # type: ignore[method-assign]
    segments, read_at = seen[-1]
    rate = product_rate(bench)
    measured = sorted(seconds_of(bench, lambda: forward(segments, read_at)) for _ in range(1 + 2 * sizes.rounds))
    seconds = measured[len(measured) // 2]
    flops = after - before
    case = f"{len(segments.token_ids)} tokens, {len(read_at)} read"
    bench.row(case, contender="forward", ms=1e3 * seconds, tflop_per_s=flops / seconds / 1e12)
    bench.figure("prefill", case, 100 * flops / seconds / rate)

    hidden = forward(segments, read_at)
    two_class = TwoClassHead.load(RandomCheckpoint(bench.model("prm-two-class", sizes.prm, QWEN_PRM)), hidden.shape[1],
                                  device=bench.device)  # fmt: skip
    heads: dict[str, Callable[..., Any]] = {"pair": scorer.head, "two classes": two_class}
    for name, head in heads.items():
        times = race(bench, {name: partial(lambda head, turn: head(hidden), head)})
        bench.figure("head", f"{name}, {case}", 100 * times.seconds[name] / (seconds + times.seconds[name]), noise=times.noise)
