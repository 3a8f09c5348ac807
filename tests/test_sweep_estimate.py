"""Dry runs: the ledger's own figures of the trees that are taken for granted, and every recipe that ships."""

import json
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest

from tts_engine.errors import EngineError
from tts_engine.ledger import DistinctSteps
from tts_engine.models.spec import DecoderSpec
from tts_engine.models.weights import RandomCheckpoint, load_decoder
from tts_engine.runner import ModelRunner
from tts_engine.search import make_method
from tts_engine.sweep.estimate import Shape, estimate, flops_of, shape
from tts_engine.sweep.plan import plan
from tts_engine.sweep.recipe import Estimate, load_recipe, recipe_of
from tts_engine.tasks.problems import TASKS
from tts_engine.testing import random_policy_directory, random_prm_directory

PAPER = Path(__file__).resolve().parents[1] / "bench" / "study" / "paper"
# What the developers' table says of a model beside what its config.json holds, and what Llama's and Mistral's know nothing of.
REMARKS = ("attention_bias", "qk_norm", "head", "confidence", "source", "note", "use_sliding_window")


# --- the tree -------------------------------------------------------------------------------------------------------------


def grown(shape):
    """The same tree, step by step: no two steps begin alike, and survivors have different parents."""
    steps, ends, number = DistinctSteps(shape.prompt), [0] * shape.n, 0
    for _ in range(shape.rounds):
        new = []
        for parent in ends:
            number += 1
            steps.add(number, parent, [number, *[0] * (shape.step - 1)])
            new.append(number)
        ends = [end for end in new[:: shape.n // shape.kept] for _ in range(shape.n // shape.kept)]
    return steps


@pytest.mark.parametrize("prompt, step, rounds, n, kept", [(7, 5, 3, 1, 1), (7, 5, 3, 4, 4), (9, 3, 4, 8, 2), (2, 1, 1, 4, 1)])
def test_a_shape_is_a_tree_that_the_ledger_counts(prompt, step, rounds, n, kept):
    own = Shape(prompt, step, rounds, n, kept)
    steps = grown(own)
    once, again = steps.drawn()
    assert own.drawn() == once and again.tokens == 0
    assert own.read() == steps.read_once(-1)
    assert own.held() == steps.widest_round()
    assert own.held(1).distinct <= own.mean_held() <= own.held().distinct


def test_flops_are_those_that_a_runner_charges(tmp_path):
    random_policy_directory(tmp_path)
    decoder = load_decoder(tmp_path)
    runner = ModelRunner(decoder, None, num_blocks=4, block_size=4)
    work = Shape(9, 3, 4, 8, 2).drawn()
    assert flops_of(decoder.spec, work, 12) == runner.flops(work, 12) > 0


@pytest.mark.parametrize(
    ("method", "told", "limits", "expected"),
    [
        (make_method("cot"), {}, {}, (150, 50, 8, 1, 1)),
        (make_method("majority", n=16), {"solution_tokens": 410}, {}, (150, 50, 9, 16, 16)),
        (make_method("best_of_n", n=16, max_steps=3), {}, {}, (150, 50, 3, 16, 16)),
        (make_method("beam", n=16), {"prompt_tokens": 9}, {}, (9, 50, 8, 16, 4)),
        (make_method("dvts", n=16, width=2), {}, {"max_step_tokens": 20}, (150, 20, 20, 16, 8)),
        (make_method("rebase", n=2), {}, {"max_tokens": 30}, (150, 30, 1, 2, 1)),
    ],
)
def test_a_method_grows_its_own_shape_within_its_limits(method, told, limits, expected):
    assert shape(method, Estimate(**told), **{"max_step_tokens": 2048, "max_tokens": 8192} | limits) == Shape(*expected)


# --- a recipe -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    random_policy_directory(directory / "owner" / "policy")
    random_prm_directory(directory / "owner" / "prm", "math-shepherd")
    return directory


def small(**changed):
    methods = [{"name": name, "n": [4, 16]} for name in ("majority", "best_of_n", "beam", "dvts")]
    data = {"task": "embedded", "limit": 10, "policies": ["owner/policy"], "prms": ["owner/prm"], "methods": methods}
    return recipe_of(data | {"estimate": {"solution_tokens": 60, "step_tokens": 12, "prompt_tokens": 40}} | changed, "recipe")


def test_every_cell_has_its_cost_alone_and_the_hours_of_what_is_executed(models):
    found = estimate(small(), models)
    assert found.missing == [] and [cost.name for cost in found.costs] == [cell.name for cell in plan(small())]
    costs = {(cost.method, cost.n): cost for cost in found.costs}
    spec = RandomCheckpoint(models / "owner" / "policy").spec
    assert costs["majority", 16].policy_flops == 10 * flops_of(spec, Shape(40, 12, 5, 16, 16).drawn(), spec.lm_head_flops)
    assert costs["majority", 16].prm_flops == 0 < costs["best_of_n", 16].prm_flops < costs["best_of_n", 4].prm_flops * 4
    assert costs["best_of_n", 16].policy_flops == costs["majority", 16].policy_flops > costs["beam", 16].policy_flops
    assert costs["dvts", 16].kv_bytes == costs["beam", 16].kv_bytes < costs["best_of_n", 16].kv_bytes
    assert costs["dvts", 16].kv_logical_bytes == costs["best_of_n", 16].kv_logical_bytes
    hours = {key: cost.hours for key, cost in costs.items()}
    assert [key for key in hours if hours[key] == 0] == [("majority", 4), ("best_of_n", 4), ("dvts", 4)]
    assert hours["best_of_n", 16] < hours["majority", 16] + hours["beam", 16]
    assert all(cost.problems == 10 and cost.gpus == 1 for cost in found.costs)
    doubled = estimate(small(estimate={"solution_tokens": 60, "step_tokens": 12, "prompt_tokens": 40, "utilisation": 1}), models)
    assert [2 * cost.hours for cost in doubled.costs] == [cost.hours for cost in found.costs]


def test_what_cannot_be_had_is_named_and_the_rest_is_told(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = estimate(small(policies=["owner/policy", "no-such/policy"]), models)
    [sentence] = found.missing
    assert sentence.startswith("no-such/policy is no local directory") and {cost.policy for cost in found.costs} == {"owner/policy"}
    told = {"problems": 7}
    with pytest.raises(EngineError, match="is no task and no file"):
        estimate(small(task="no/such/task.jsonl"), models)
    found = estimate(small(task="no/such/task.jsonl", estimate=told), models)
    assert "taken to have 7 problems" in found.missing[0] and found.costs[0].problems == 7
    odd = small(methods=[{"name": "majority", "n": 4}, {"name": "auto", "n": 4, "strategy": str(tmp_path / "none")}])
    found = estimate(odd, models)
    assert [cost.method for cost in found.costs] == ["majority"] and "is no strategy and no file" in found.missing[0]


def test_auto_costs_what_its_dearest_method_does(models):
    """paper_table has beam search for every policy so small."""
    found = estimate(small(methods=[{"name": "beam", "n": 16}, {"name": "auto", "n": 16, "strategy": "paper_table"}]), models)
    beam, auto = found.costs
    assert (auto.method, auto.policy_flops, auto.prm_flops) == ("auto", beam.policy_flops, beam.prm_flops)


# --- the recipes that ship ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs(shared, tmp_path_factory):
    """The developers' table as a directory of config.json."""
    directory = tmp_path_factory.mktemp("configs")
    table = json.loads((shared / "model_configs" / "model_configs.json").read_text(encoding="utf-8"))["models"]
    for name, entry in table.items():
        (directory / name).mkdir(parents=True)
        config = {key: value for key, value in entry.items() if key not in REMARKS}
        (directory / name / "config.json").write_text(json.dumps(config))
    return directory


def test_recipes_ship():
    assert sorted(path.stem for path in PAPER.glob("*.yaml")) == ["aime24", "aime24-r1", "math500", "math500-r1"]


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_that_ships_has_a_cost_for_every_cell(path, shared, configs, monkeypatch):
    recipe = load_recipe(path)
    assert recipe.task in TASKS and recipe.split == "test" and recipe.limit is None
    local = replace(recipe, task=str(shared / "benchmarks" / f"{recipe.task}.jsonl"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = estimate(local, configs)
    assert found.missing == [] and len(found.costs) == len(plan(recipe))
    assert {cost.problems for cost in found.costs} == {recipe.estimate.problems}
    assert {cost.n for cost in found.costs} - {1, 512} == {4, 16, 64, 256}
    assert all(cost.policy_flops > 0 and cost.kv_bytes <= cost.kv_logical_bytes for cost in found.costs)
    assert all((cost.hours > 0) == (cost.made != "replayed") for cost in found.costs)
    for cost in found.costs:  # weights of 72 B parameters take more than one
        assert cost.gpus >= ceil(cost.weight_bytes / 141e9)


def test_the_papers_own_figure_comes_out(configs, shared):
    """It has 3.07e17 FLOPs for what the 3B policy draws at n = 256 for MATH-500, by two a parameter and token."""
    recipe = load_recipe(PAPER / "math500.yaml")
    name = "meta-llama/Llama-3.2-3B-Instruct"
    recipe = replace(recipe, policies=(name,), methods=({"name": "majority", "n": 256, "max_steps": 200},), prms=(), pilot=None,
                     task=str(shared / "benchmarks" / "math500.jsonl"))  # fmt: skip
    [cost] = estimate(recipe, configs).costs
    spec = DecoderSpec.from_hf(json.loads((configs / name / "config.json").read_text()), name)
    tokens = 500 * 256 * 400
    assert cost.policy_flops == pytest.approx(2 * spec.num_parameters * tokens, rel=0.1) == pytest.approx(3.07e17, rel=0.2)
