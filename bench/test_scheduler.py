"""What the order of work is worth, by the models that ship: searches side by side, barriers, speculation, determinism.

Steps are those that the policy writes, most of a round equally long, or have drawn lengths of 50 or 100 tokens on average, uniform
from half to one and a half times as many, so that a round waits for its longest. Every contender has to answer all problems.
"""

from functools import partial

import pytest

from tts_engine.embedded import BLOCK_SIZE, model_path
from tts_engine.engine import Engine
from tts_engine.search import make_method
from tts_engine.tasks.problems import load_task

from .baselines.models import make_models

pytestmark = pytest.mark.timeout(0)
POLICY, PRM = "policy-s", "prm-good"
N, PROBLEMS, ALONE = 16, 32, 4
ROWS = (64, 128, 256, 512)
DEPTH = 4  # steps of drawn lengths: the models have 512 positions


def make_engine(policy=None, prm=None, *, steps: int | None = None, **settings) -> Engine:
    """One over the models that ship, or over others; steps: their mean length, as the policy writes them where it is None."""
    drawn = {} if steps is None else {"steps": str(steps), "max_step_tokens": 2 * steps, "max_tokens": 2 * DEPTH * steps}
    directories = (policy or model_path(POLICY), prm or model_path(PRM))
    return Engine.from_pretrained(*directories, block_size=BLOCK_SIZE, **drawn | settings)


def method_of(name: str, steps: int | None = None):
    return make_method(name, n=N, **({} if steps is None else {"max_steps": DEPTH}))


def side_by_side(engine, problems, method):
    engine.forget()
    return engine.search(problems, method)


def one_by_one(engine, problems, method):
    return [side_by_side(engine, problem, method)[0] for problem in problems]


def drawn(results) -> int:
    return sum(result.ledger.policy.tokens_generated for result in results)


def told(results, seconds: float) -> dict[str, float]:
    policies = [result.ledger.policy for result in results]
    adopted, wasted = (sum(getattr(one, name) for one in policies) for name in ("tokens_adopted", "tokens_wasted"))
    columns: dict[str, float] = {"tokens/s": drawn(results) / seconds}
    if adopted + wasted:
        columns |= {
            "hit rate": adopted / (adopted + wasted),
            "adopted": adopted / drawn(results),
            "wasted": wasted / drawn(results),
        }
    return columns


@pytest.mark.parametrize("name", ["beam", "dvts"])
@pytest.mark.parametrize("steps", [None, 50, 100], ids=["written", "drawn-50", "drawn-100"])
def test_speculation_alone(race, name, steps):
    problems, method = load_task("embedded", "test", ALONE), method_of(name, steps)
    with make_engine(steps=steps) as plain, make_engine(steps=steps, speculate=True) as speculating:
        contenders = {"plain": plain, "speculating": speculating}
        race(f"{name} n={N} alone, {steps or 'written'} steps, embedded",
             {who: partial(one_by_one, engine, problems, method) for who, engine in contenders.items()},
             slow=True, columns=told)  # fmt: skip


@pytest.mark.parametrize("name", ["beam", "dvts"])
def test_speculation_alone_in_a_slice(race, request, tmp_path, name):
    """Of a model of 0.5B parameters, as wide as it is, in bfloat16."""
    layers, settings = request.config.getoption("--layers"), {"load": "random", "dtype": "bfloat16", "steps": 50}
    models, method = make_models(tmp_path, layers), method_of(name, 50)
    problems = ["a0b1c2d3e4f5g6h7i8j9" * 5]
    with make_engine(*models, **settings) as plain, make_engine(*models, speculate=True, **settings) as speculating:
        race(f"{name} n={N} alone, 50 steps, {layers} of 24 layers",
             {"plain": partial(side_by_side, plain, problems, method),
              "speculating": partial(side_by_side, speculating, problems, method)},
             slow=True, columns=told)  # fmt: skip


@pytest.mark.parametrize("steps", [None, 50], ids=["written", "drawn-50"])
def test_barriers(race, tell, steps):
    """Beam search, which waits for its siblings, against as many trajectories that wait for nobody, each with every row budget."""
    problems = load_task("embedded", "test", PROBLEMS)
    case, methods = f"n={N} over {PROBLEMS} problems, {steps or 'written'} steps", ("beam", "best_of_n")
    engines = {rows: make_engine(steps=steps, max_rows=rows) for rows in ROWS}
    contenders = {(name, rows): partial(side_by_side, engine, problems, method_of(name, steps))
                  for name in methods for rows, engine in engines.items()}  # fmt: skip
    tokens = {key: drawn(run()) for key, run in contenders.items()}
    seconds = race(case, {f"{name}, {rows} rows": run for (name, rows), run in contenders.items()}, slow=True, columns=told)
    beam, free = (max(tokens[name, rows] / seconds[f"{name}, {rows} rows"] for rows in ROWS) for name in methods)
    tell(case, contender="beam of best_of_n, tokens/s", **{"times ours": beam / free})
    for engine in engines.values():
        engine.close()


@pytest.mark.parametrize("name", ["beam", "best_of_n"])
def test_together(race, name):
    problems, method = load_task("embedded", "test", PROBLEMS), method_of(name)
    with make_engine() as engine:
        race(f"{name} n={N}, {PROBLEMS} problems", {"side by side": partial(side_by_side, engine, problems, method),
                                                    "one by one": partial(one_by_one, engine, problems, method)},
             slow=True, columns=told)  # fmt: skip


@pytest.mark.parametrize("problems", [1, PROBLEMS])
@pytest.mark.parametrize("name", ["beam", "best_of_n"])
def test_price_of_determinism(race, name, problems):
    given, method = load_task("embedded", "test", problems), method_of(name)
    with make_engine() as engine, make_engine(deterministic=True) as deterministic:
        race(f"{name} n={N}, {problems} problems", {"default": partial(side_by_side, engine, given, method),
                                                    "deterministic": partial(side_by_side, deterministic, given, method)},
             slow=True, columns=told)  # fmt: skip
