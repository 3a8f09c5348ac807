"""What dtype="int8" changes on the embedded task: logits, answers and PRM scores, each against float32 on the same problems.

Run with `pytest bench/test_int8.py -s`: it prints its figures with 95 % intervals over problems.
"""

import math
from statistics import NormalDist, fmean, stdev

import pytest
import torch

from tts_engine.attention import make_backend
from tts_engine.embedded import BLOCK_SIZE, model_path
from tts_engine.engine import Engine
from tts_engine.kv.cache import KVCache
from tts_engine.report.intervals import paired_difference
from tts_engine.search import BeamSearch, BestOfN, Cot
from tts_engine.tasks.problems import load_task
from tts_engine.testing import run_rows

pytestmark = pytest.mark.timeout(0)
PROBLEMS = 300
METHODS = {"greedy": Cot(), "beam search, n=16": BeamSearch(n=16)}
SAMPLES = 4  # solutions a problem whose steps the PRM scores
POLICIES, PRMS = ("policy-s", "policy-m", "policy-l"), ("prm-good", "prm-poor")


@pytest.fixture(scope="module")
def problems():
    return load_task("embedded", "calibration", PROBLEMS)


def engines(policy, prm):
    """By dtype."""
    models = model_path(policy), model_path(prm)
    return {dtype: Engine.from_pretrained(*models, block_size=BLOCK_SIZE, dtype=dtype) for dtype in ("float32", "int8")}


def interval(values):
    """A mean over problems, and half of its 95 % interval."""
    return fmean(values), NormalDist().inv_cdf(0.975) * stdev(values) / math.sqrt(len(values))


def hidden_states(decoder, ids):
    cache = KVCache(num_layers=decoder.spec.num_layers, num_blocks=len(ids), block_size=1, num_kv_heads=decoder.spec.num_kv_heads,
                    head_dim=decoder.spec.head_dim, dtype=decoder.dtype)  # fmt: skip
    return run_rows(decoder, make_backend("native"), cache, [list(range(len(ids)))], [len(ids)], [ids])


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_of_a_policys_own_solutions(problems, policy):
    by_dtype = engines(policy, PRMS[0])
    errors, same = [], []
    for result in by_dtype["float32"].search(problems, Cot()):
        path = [token for step in result.branches[0].path for token in step.tokens]
        ref, out = (e.policy.runner.decoder.logits(hidden_states(e.policy.runner.decoder, path)) for e in by_dtype.values())
        errors.append(((out - ref).square().mean().sqrt() / ref.std()).item())
        same.append((out.argmax(-1) == ref.argmax(-1)).float().mean().item())
    error, agree = interval(errors), interval(same)
    print(f"\n{policy}: logits differ by {100 * error[0]:.2f} ± {100 * error[1]:.2f} % of their deviation (RMS); "
          f"the likeliest token is the same at {100 * agree[0]:.2f} ± {100 * agree[1]:.2f} % of positions")  # fmt: skip
    assert 0 < error[0] < 0.2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", POLICIES)
def test_accuracy(problems, policy, method):
    right = {}
    for dtype, engine in engines(policy, PRMS[0]).items():
        right[dtype] = [r.answer == r.problem.answer for r in engine.search(problems, METHODS[method])]
    change, low, high = paired_difference(right["int8"], right["float32"])
    shares = ", ".join(f"{dtype} {100 * fmean(values):.1f} %" for dtype, values in right.items())
    print(f"\n{policy}, {method}: {shares}; int8 changes {100 * change:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")
    assert low <= 0 <= high or abs(change) < 0.05


@pytest.mark.parametrize("prm", PRMS)
def test_scores_of_the_same_steps(problems, prm):
    """Solutions of policy-m in float32, read by both PRMs in one forward each."""
    by_dtype = engines("policy-m", prm)
    shift, size, flips = [], [], []
    for result in by_dtype["float32"].search(problems, BestOfN(n=SAMPLES)):
        differences, sides = [], []
        for branch in result.branches:
            ids, positions = by_dtype["float32"].scorer.spec.render(result.problem.problem, [step.text for step in branch.steps])
            ref, out = (e.scorer.head(hidden_states(e.scorer.runner.decoder, ids)[positions]) for e in by_dtype.values())
            differences.append(out - ref)
            sides.append((out > 0.5) != (ref > 0.5))
        shift.append(torch.cat(differences).mean().item())
        size.append(torch.cat(differences).abs().mean().item())
        flips.append(torch.cat(sides).float().mean().item())
    (moved, half), (by, wide), (crossed, span) = map(interval, (shift, size, flips))
    print(f"\n{prm}: a step's score moves by {by:.4f} ± {wide:.4f}, on average by {moved:+.4f} ± {half:.4f}; "
          f"{100 * crossed:.2f} ± {100 * span:.2f} % cross 0.5")  # fmt: skip
    assert by < 0.1
