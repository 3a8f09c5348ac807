"""What the order of work may not change, counted; and what it may, as little as possible.

Searches of the same problems, side by side, one at a time, in another order, on few rows, ahead of being asked, in a quarter of the
memory, with one thread: with `deterministic=True` no answer, token or score may differ. In the default mode some do, since the bits
of a product of matrices depend on how many rows it has. And in less memory than all searches would keep, hardly anything is
computed that an ideal executor would not.
"""

import pytest
import torch

from tts_engine.embedded import BLOCK_SIZE, model_path
from tts_engine.engine import Engine
from tts_engine.ledger import Ledger
from tts_engine.search import make_method
from tts_engine.tasks.problems import load_task

pytestmark = pytest.mark.timeout(0)
N, PROBLEMS, FEW = 8, 200, 24
METHODS = ("cot", "majority", "best_of_n", "beam", "dvts", "rebase")
SHARES = (1.0, 0.5, 0.25, 0.12)


def make_engine(**settings) -> Engine:
    return Engine.from_pretrained(model_path("policy-s"), model_path("prm-good"), block_size=BLOCK_SIZE, max_tokens=256, **settings)


def kept(engine: Engine) -> list[int]:
    """The most bytes of keys and values that its searches keep, from now on."""
    most, look = [0], engine.budget.look

    def noting():
        now = sum(sum(runner.tree.counts()[1:]) * runner.block_bytes for runner in engine.runners)
        most[0] = max(most[0], now)
        look()

    engine.budget.look = noting
    return most


def drawn(results) -> dict:
    """By problem and draw: its tokens and its score; and the answers."""
    found = {(result.problem.id, node.identity): (node.tokens, node.score) for result in results for node in result.nodes}
    return found | {result.problem.id: result.answer for result in results}


def changed(ours: dict, theirs: dict) -> tuple[dict[str, int], float]:
    """Tokens, scores and answers that are not the same, or are there in one of the two alone; and how far two scores of the same
    step are apart at most."""
    counts, apart = {"tokens": 0, "scores": 0, "answers": 0}, 0.0
    for key in ours.keys() | theirs.keys():
        if isinstance(key, str):
            counts["answers"] += ours[key] != theirs[key]
            continue
        (mine, my_score), (other, other_score) = ours.get(key, ((), None)), theirs.get(key, ((), None))
        same = sum(a == b for a, b in zip(mine, other, strict=False))
        counts["tokens"] += max(len(mine), len(other)) - same
        counts["scores"] += my_score != other_score
        if my_score is not None and other_score is not None and mine == other:
            apart = max(apart, abs(my_score - other_score))
    return counts, apart


def variants(problems, method, seed: int, memory: int, **settings):
    """Name -> results of all problems, as another order of work gives them."""

    def searched(given=problems, **others):
        with make_engine(**settings | others) as engine:
            return engine.search(given, method, seed=seed)

    def one_at_a_time():
        with make_engine(**settings) as engine:
            return [engine.search(problem, method, seed=seed)[0] for problem in problems]

    def one_thread():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return searched()
        finally:
            torch.set_num_threads(threads)

    yield "one at a time", one_at_a_time()
    yield "the other way round", searched(problems[::-1])
    yield "on few rows", searched(max_rows=FEW)
    yield "speculating", searched(speculate=True)
    yield "a quarter of the memory", searched(kv_bytes=memory)
    yield "one thread", one_thread()


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "default"])
@pytest.mark.parametrize("name", METHODS)
def test_what_the_order_of_work_changes(tell, name, deterministic):
    problems, method = load_task("embedded", "test", PROBLEMS), make_method(name, **({} if name == "cot" else {"n": N}))
    with make_engine(deterministic=deterministic) as engine:
        most = kept(engine)
        ours = drawn(engine.search(problems, method))
    tokens = sum(len(value[0]) for key, value in ours.items() if not isinstance(key, str))
    mode = "deterministic" if deterministic else "default"
    for variant, results in variants(problems, method, 0, max(most[0] // 4, 3_000_000), deterministic=deterministic):
        counts, apart = changed(ours, drawn(results))
        tell(f"{name}, {PROBLEMS} problems, {mode}", contender=variant, tokens=tokens, **{
            f"{what} changed": count for what, count in counts.items()
        }, **{"tokens changed per million": 1e6 * counts["tokens"] / tokens, "scores apart": apart})  # fmt: skip
        assert not deterministic or not any(counts.values()), f"{variant}: {counts}"


@pytest.mark.parametrize("name", METHODS[1:])
def test_how_much_of_the_work_is_useful_in_less_memory(tell, name):
    problems, method = load_task("embedded", "test", 100), make_method(name, n=16)
    with make_engine() as engine:
        most = kept(engine)
        engine.admission.expected = lambda *asked: [0, 0]  # all at once: what they would keep together
        engine.search(problems, method)
    for share in SHARES:
        with make_engine(kv_bytes=int(share * most[0])) as engine:
            total = Ledger.empty()
            for result in engine.search(problems, method):
                total.add(result.ledger)
        tell(f"{name} n=16, 100 problems", memory=f"{share:.0%}", MB=share * most[0] / 1e6, useful=total.useful, **total.wasted,
             preemptions=total.policy.preemptions, evicted=total.policy.blocks_evicted + total.prm.blocks_evicted,
             recomputed=total.policy.tokens_recomputed + total.prm.tokens_recomputed)  # fmt: skip
