"""A user without weights: the real vocabularies, prompts and problems, a decoder of two small layers, every method from the
command line."""

import json
import shutil

import pytest

from tts_engine.cli import main
from tts_engine.search import METHODS, make_method

SHRUNK = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2}
LIMIT, BUDGET, STEP, WHOLE = 3, 4, 12, 40  # problems, n, tokens of a step and of a solution


@pytest.fixture(scope="module")
def models(shared, tmp_path_factory):
    """Directories of a policy and a PRM: config.json and tokenizer only."""
    configs = json.loads((shared / "model_configs" / "model_configs.json").read_text())["models"]
    made = []
    for name, tokenizer in (("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5"), ("Qwen/Qwen2.5-Math-PRM-7B", "qwen2.5-math-prm")):
        directory = tmp_path_factory.mktemp(tokenizer)
        kept = {key: value for key, value in configs[name].items() if key not in ("head_dim", "attention_bias")}
        (directory / "config.json").write_text(json.dumps(kept | SHRUNK))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(shared / "tokenizers" / tokenizer / file, directory)
        made.append(directory)
    return made


@pytest.mark.parametrize("method", METHODS)
def test_math500_is_evaluated_with_random_weights(models, shared, tmp_path, method, capsys):
    policy, prm = models
    command = [
        "eval", "--task", str(shared / "benchmarks" / "math500.jsonl"), "--limit", str(LIMIT), "--method", method,
        "--policy", str(policy), "--prm", str(prm), "--load", "random", "--dtype", "bfloat16", "--max-steps", "4",
        "--max-step-tokens", str(STEP), "--max-tokens", str(WHOLE), "--out", str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    budget = {} if method == "cot" else {"n": BUDGET}
    command += [str(word) for name, n in budget.items() for word in (f"--{name}", n)]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["failed"] == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "problems.jsonl").read_text().splitlines()]
    assert len(records) == LIMIT and len({record["id"] for record in records}) == LIMIT
    for record in records:
        nodes, ledger = record["nodes"], record["ledger"]
        assert record["error"] is None and record["correct"] in (True, False) and record["branches"]
        assert ledger["policy"]["tokens_generated"] == sum(len(node["tokens"]) for node in nodes) > 0
        assert all(0 < len(node["tokens"]) <= STEP for node in nodes)
        scored = [node["score"] for node in nodes if node["score"] is not None]
        assert bool(scored) == make_method(method, **budget).uses_prm and all(0 <= score <= 1 for score in scored)
        assert 0 < len(record["prompt_tokens"]) and max(record["prompt_tokens"]) < 151_936


def test_a_pair_of_true_size_is_told_before_anything_is_loaded(shared, tmp_path, capsys):
    configs = json.loads((shared / "model_configs" / "model_configs.json").read_text())["models"]
    paths = []
    for name in ("Qwen/Qwen2.5-72B-Instruct", "Qwen/Qwen2.5-Math-PRM-7B"):
        paths.append(tmp_path / f"{name.rpartition('/')[2]}.json")
        paths[-1].write_text(json.dumps({key: value for key, value in configs[name].items() if key != "attention_bias"}))
    command = ["info", "--policy", str(paths[0]), "--prm", str(paths[1]), "--memory", "141GB", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = [model["parameters"] for model in told["models"]]
    assert sizes[0] == pytest.approx(72.7e9, rel=0.01) and sizes[1] == pytest.approx(7.1e9, rel=0.02)
