"""Where the time of a tick goes: the model's, and everything around it.

Microseconds a tick on the thread that runs the engine: medians over the ticks of one run that have ROWS rows or nearly so. They are
of a clock, not of processor time, whose reading can cost more than what is to be timed: a quiet machine is needed. A part is what
its method does itself, without the other parts that it calls; `engine` is whatever runs between ticks. `outside` is all but the
decoder's forward and its logits, from a run of its own in which only these are timed; the parts come from another. The PRM's turns
count nowhere. By default the larger model is a slice, see baselines/models.py; `--layers 24` takes all of it.
"""

import time
from collections import Counter
from statistics import median

import pytest

from tts_engine import policy as room
from tts_engine.embedded import BLOCK_SIZE, model_path
from tts_engine.engine import Engine
from tts_engine.search import Driver, Majority, make_method
from tts_engine.tasks.problems import Problem, load_task

from .baselines.models import SHAPE, make_models, text_of

ROWS = 64
FORWARD, LOGITS, PRM, ENGINE = "GEMM", "logits", "PRM", "engine"


class Stopwatch:
    """Seconds by part, and a copy of them as each tick of a policy begins."""

    def __init__(self, policy: room.Policy, patch: pytest.MonkeyPatch) -> None:
        self.seconds: Counter[str] = Counter()
        self.ticks: list[tuple[int, Counter[str]]] = []  # (rows, seconds so far)
        self._patch, self._open, self._since = patch, [ENGINE], time.perf_counter()
        tick = policy.tick

        def noted() -> None:
            self._turn()
            self.ticks.append((min(policy.num_open, policy.max_rows), self.seconds.copy()))
            tick()

        patch.setattr(policy, "tick", noted)

    def part(self, owner: object, name: str, part: str) -> None:
        """What `owner.name` does counts as this part from now on."""
        inner = getattr(owner, name)

        def timed(*given, **how):
            self._turn()
            self._open.append(part)
            try:
                return inner(*given, **how)
            finally:
                self._turn()
                self._open.pop()

        self._patch.setattr(owner, name, timed)

    def full_ticks(self) -> list[Counter[str]]:
        """Seconds by part of each tick that had ROWS rows or nearly so, from its beginning to the next one's."""
        pairs = zip(self.ticks, self.ticks[1:], strict=False)
        return [after - before for (rows, before), (_, after) in pairs if rows >= ROWS - 4]

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


def run(engine: Engine, problems, method, patch: pytest.MonkeyPatch, *, every_part: bool) -> list[Counter[str]]:
    """Search the problems from nothing; the seconds of each full tick."""
    policy, scorer = engine.policy, engine.scorer
    engine.forget()
    watch = Stopwatch(policy, patch)
    if every_part:
        watch.part(policy, "tick", "policy")
        watch.part(policy.runner, "forward", "layout")
        watch.part(policy.runner.backend, "plan", "plan")
        watch.part(policy.runner.backend, "run", "attention")
        watch.part(room, "sample", "sampling")
        watch.part(Driver, "answer", "method")
    watch.part(policy.runner.decoder, "forward", FORWARD)
    watch.part(policy.runner.decoder, "logits", LOGITS)
    for name in ("submit", "offer", "start", "finish") if scorer is not None else ():
        watch.part(scorer, name, PRM)
    engine.search(problems, method)
    return watch.full_ticks()


def split(engine: Engine, problems, method) -> dict[str, float]:
    """Two runs after a rehearsal: what is outside forwards, and all parts; with how many full ticks they had."""
    engine.search(problems, method)
    told: dict[str, float] = {}
    for every_part in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            ticks = run(engine, problems, method, patch, every_part=every_part)
        assert len(ticks) > 10, f"{len(ticks)} ticks with {ROWS} rows tell nothing"
        if not every_part:
            told = {"ticks": len(ticks), "outside": 1e6 * median(tick[ENGINE] for tick in ticks)}
    parts = dict.fromkeys(part for tick in ticks for part in tick if part != PRM)
    return told | {part: 1e6 * median(tick[part] for tick in ticks) for part in parts}


@pytest.mark.parametrize("name", ["majority", "best_of_n", "beam"])
def test_a_tick_of_the_smallest_embedded_model(tell, name):
    method, problems = make_method(name, n=16), load_task("embedded", "test", 16)
    prm = model_path("prm-good") if method.uses_prm else None
    with Engine.from_pretrained(model_path("policy-s"), prm, block_size=BLOCK_SIZE, max_rows=ROWS) as engine:
        tell(f"policy-s, {name}", **split(engine, problems, method))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tick_of_a_large_vocabulary(tell, tmp_path, request, dtype):
    """Qwen2.5-0.5B's shape, a prompt of 150 and steps of 50 tokens."""
    layers = request.config.getoption("--layers")
    directory, _ = make_models(tmp_path, layers)
    problem = Problem(id="growth", problem=text_of(150), answer=None)
    with Engine.from_pretrained(directory, load="random", dtype=dtype, steps="50", system="", max_rows=ROWS) as engine:
        told = split(engine, problem, Majority(n=ROWS, max_steps=2))
    tell(f"{layers} of {SHAPE['num_hidden_layers']} layers, {dtype}", **told)
