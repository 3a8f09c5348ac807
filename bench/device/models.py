"""Whole models checked: against transformers, those that ship against the CPU, one batch against another, and `tts-engine eval`."""

import copy
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from tts_engine.embedded import BLOCK_SIZE, model_path
from tts_engine.engine import Engine
from tts_engine.results import SearchResult
from tts_engine.runner import Segments
from tts_engine.search import make_method
from tts_engine.tasks.problems import Problem, load_task

from ..baselines.models import text_of
from .engines import NAMES, language_model, load
from .setting import PAIR_PRM, QWEN_PRM, Bench, Config, near

READ = 100  # tokens whose logits are compared, as long as the model's positions
ALIKE = 0.9  # of steps and of answers: what float32 leaves open, another arithmetic may decide otherwise, and all that follows
# How far two of transformers' logits may lie apart, as a share of the largest, for either to count as the greedy choice.
TIE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
# What a logit may be off by, as a share of the largest.
MOST_OFF = {torch.float32: 1e-3, torch.bfloat16: 0.08}


def models(bench: Bench) -> None:
    """Random weights in both: logits of a text, and what is written greedily behind it."""
    for name, config in bench.sizes.policies.items():
        for dtype in [dtype for dtype in NAMES if dtype in bench.sizes.checked]:
            bench.check(f"{name} {NAMES[dtype]}", partial(_as_transformers, bench, name, config, dtype))
            if bench.on_gpu:
                torch.cuda.empty_cache()
    if bench.on_gpu:
        name, config = next(iter(bench.sizes.policies.items()))
        bench.check(f"{name} fp8", partial(_in_fp8, bench, name, config))
    bench.settle()


def _in_fp8(bench: Bench, name: str, config: Config) -> dict[str, Any]:
    """How far 8-bit floats take the logits of random weights from bfloat16's."""
    directory, logits = bench.model(name, config), list[Tensor]()
    ids = list(np.random.default_rng(0).integers(0, config["vocab_size"], READ).tolist())
    for dtype in ("bfloat16", "fp8"):
        with load(bench, directory, dtype=dtype) as engine:
            logits.append(_logits(engine, ids).double())
        del engine
    apart = float((logits[1] - logits[0]).square().mean().sqrt() / logits[0].square().mean().sqrt())
    assert apart < 0.2, f"logits are {apart:.3g} of their size away from bfloat16's"
    return {"logits apart": apart}


def _as_transformers(bench: Bench, name: str, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    directory = bench.model(name, config)
    theirs = language_model(directory, dtype, bench.device)
    problem = Problem(id="greedy", problem=text_of(READ), answer=None)
    with load(bench, directory, dtype=NAMES[dtype], steps="1000", max_step_tokens=bench.sizes.new) as engine:
        [result] = engine.search(problem, make_method("cot", max_steps=1))
        [node] = result.nodes
        prompt = list(node.path[0].tokens)
        got = _logits(engine, prompt)
    ids = torch.tensor([prompt], device=bench.device)
    with torch.inference_mode():
        plain = theirs(input_ids=ids).logits[0].float()
        wide = copy.deepcopy(theirs).to(torch.float64 if dtype == torch.float32 else torch.float32)
        exact = wide(input_ids=ids).logits[0].double()
    del wide
    return near(got, exact, plain, MOST_OFF[dtype]) | {"same tokens": _same_greedy(theirs, prompt, node.tokens, TIE[dtype])}


def _logits(engine: Engine, ids: Sequence[int]) -> Tensor:
    """Of every token, float32 [T, V], read as one run."""
    runner, nothing = engine.policy.runner, np.zeros(1, np.int32)
    nodes = runner.hold_path([ids])
    assert nodes is not None, "the pool has no room for one text"
    segments = Segments(handles=np.array(nodes, np.int64), is_lease=np.zeros(1, bool), starts=nothing,
                        counts=np.array([len(ids)], np.int32), path_starts=nothing, token_ids=np.array(ids, np.int64))  # fmt: skip
    logits = runner.decoder.logits(runner.forward(segments, np.arange(len(ids))))
    runner.tree.drop(nodes[0])
    return logits


def _same_greedy(model: Any, prompt: Sequence[int], tokens: Sequence[int], tie: float) -> int:
    """How many of the tokens a greedy transformers would have written, up to the first that it would not, which must be a tie."""
    cache, ids = DynamicCache(config=model.config), torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode():
        for place, token in enumerate(tokens):
            logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
            best = int(logits.argmax())
            if best != token:
                apart = float((logits[best] - logits[token]) / logits.abs().max())
                assert apart <= tie, f"token {place} of {len(tokens)} is {token}, transformers writes {best}: {apart:.3g} apart"
                return place
            ids = torch.tensor([[token]], device=model.device)
    return len(tokens)


def batch(bench: Bench) -> None:
    """deterministic=True: a problem alone, and among others, to the last bit of its scores."""
    problems = load_task("embedded", "test", min(6, 1 + bench.sizes.problems))
    for dtype in [NAMES[dtype] for dtype in NAMES if dtype in bench.sizes.checked]:
        bench.check(f"alone and among {len(problems)}, {dtype}", partial(_alone, bench, problems, dtype))
    bench.settle()


def _alone(bench: Bench, problems: Sequence[Problem], dtype: str) -> dict[str, Any]:
    method, scores = make_method("beam", n=4, max_steps=4), 0
    with _embedded(bench, str(bench.device), bench.backend, dtype=dtype, deterministic=True) as engine:
        together = engine.search(problems, method)
        for problem, among in zip(problems[:2], together, strict=False):
            engine.forget()
            [alone] = engine.search(problem, method)
            mine, theirs = ({node.identity: (node.tokens, node.score) for node in one.nodes} for one in (alone, among))
            assert mine == theirs, f"problem {problem.id} came out otherwise among others"
            scores += len(mine)
    return {"steps and scores": scores}


def ticks(bench: Bench) -> None:
    """Captured ticks on end against the same ticks one by one: where no bit depends on the batch, the same tokens; else most."""
    problems = load_task("embedded", "test", min(4, bench.sizes.problems))
    for dtype in [NAMES[dtype] for dtype in NAMES if dtype in bench.sizes.checked]:
        for deterministic in (True, False):
            case = f"{dtype}{', deterministic' if deterministic else ''}"
            bench.check(case, partial(_as_one_by_one, bench, problems, dtype, deterministic))
    bench.settle()


def _as_one_by_one(bench: Bench, problems: Sequence[Problem], dtype: str, deterministic: bool) -> dict[str, Any]:
    method, sides, begun = make_method("majority", n=16, max_steps=6), list[dict[tuple[int, int], tuple[int, ...]]](), list[int]()
    with _embedded(bench, str(bench.device), bench.backend, dtype=dtype, deterministic=deterministic) as engine:
        graphs = engine.policy.graphs
        if graphs is None:
            assert not bench.on_gpu, "nothing is captured on a GPU"
            return {"missing": "nothing is captured on this device"}
        start = graphs.start

        def started(outlook: Any, draws: Any) -> None:
            begun.append(len(draws.token))
            start(outlook, draws)

        graphs.start = started  # type: ignore[method-assign]
        for used in (graphs, None):
            engine.policy.graphs = used
            engine.forget()
            results = engine.search(problems, method)
            sides.append({(i, node.identity): node.tokens for i, result in enumerate(results) for node in result.nodes})
    assert begun, "no graph was used"
    same = sum(sides[0].get(key) == tokens for key, tokens in sides[1].items()) / len(sides[1])
    assert same == 1.0 or not deterministic, f"{same:.0%} of the steps are the same"
    assert same >= ALIKE or dtype != "float32", f"{same:.0%} of the steps are the same"
    return {"equal steps": same, "times on end": len(begun)}


def demo(bench: Bench) -> None:
    """The models that ship: the CPU's searches again."""
    problems = load_task("embedded", "test", bench.sizes.problems)
    for name in ("best_of_n", "beam"):
        method = make_method(name, n=16 if bench.on_gpu else 4, max_steps=40 if bench.on_gpu else 3)
        bench.check(f"{name}, n={method.n}, {len(problems)} problems", partial(_as_on_cpu, bench, problems, method))
    bench.settle()


def _as_on_cpu(bench: Bench, problems: Sequence[Problem], method: Any) -> dict[str, Any]:
    sides: list[list[SearchResult]] = []
    for device, backend in (("cpu", "native"), (str(bench.device), bench.backend if bench.on_gpu else "per_branch")):
        with _embedded(bench, device, backend, dtype="float32") as engine:
            sides.append(engine.search(problems, method))
    answers = [one.answer == other.answer for one, other in zip(*sides, strict=True)]
    drawn = [{(i, node.identity): node.tokens for i, result in enumerate(side) for node in result.nodes} for side in sides]
    same = sum(drawn[0].get(key) == tokens for key, tokens in drawn[1].items()) / len(drawn[1])
    alike = sum(answers) / len(answers)
    assert alike >= ALIKE and same >= ALIKE, f"{alike:.0%} of the answers and {same:.0%} of the steps are the CPU's"
    return {"equal answers": alike, "equal steps": same}


def _embedded(bench: Bench, device: str, backend: str, **settings: Any) -> Engine:
    return Engine.from_pretrained(model_path("policy-s"), model_path("prm-good"), block_size=BLOCK_SIZE, device=device,
                                  backend=backend, **settings)  # fmt: skip


def evaluation(bench: Bench) -> None:
    """The command line over a policy and PRMs of the real shapes, weights made up."""
    for family, head in (("qwen2.5-math-prm", QWEN_PRM), ("rlhflow", PAIR_PRM)):
        bench.check(f"eval with {family}", partial(_evaluated, bench, family, head))
    bench.settle()


def _evaluated(bench: Bench, family: str, head: Config) -> dict[str, Any]:
    from tts_engine import cli  # here alone: what it imports is not to cost the other parts theirs

    limit = 4 if bench.on_gpu else 1
    out = bench.directory / f"run-{family}"
    prm = bench.model(f"prm-{family}", bench.sizes.prm, head)
    command = {"--task": "embedded", "--limit": limit, "--method": "beam", "--n": 16 if bench.on_gpu else 4, "--max-steps": 3,
               "--steps": 20, "--load": "random", "--policy": bench.model("policy", bench.sizes.policy), "--prm": prm,
               "--device": bench.device, "--backend": bench.backend, "--dtype": NAMES[bench.sizes.dtype],
               "--kv-bytes": "8G" if bench.on_gpu else "16M", "--out": out}  # fmt: skip
    began = time.monotonic()
    status = cli.main(["eval", *[str(word) for pair in command.items() for word in pair]])
    assert status == 0, f"tts-engine eval ended with status {status}"
    records = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
    errors = [record["error"] for record in records if record["error"] is not None]
    assert len(records) == limit and not errors, f"{len(records)} of {limit} problems are in the run, errors: {errors}"
    assert all(node["score"] is not None for record in records for node in record["nodes"]), "some step has no score"
    return {"problems": limit, "seconds with loading": time.monotonic() - began}
