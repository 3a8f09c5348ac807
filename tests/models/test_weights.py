import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tts_engine.attention import make_backend
from tts_engine.config import EngineConfig
from tts_engine.engine import Engine
from tts_engine.errors import ModelError
from tts_engine.models.linear import FP8, Fp8, Int8, Plain
from tts_engine.models.weights import RandomCheckpoint, load_decoder, resolve_checkpoint
from tts_engine.runs import describe_run
from tts_engine.search import BeamSearch
from tts_engine.testing import poisoned_cache, random_model, random_policy_directory, random_prm_directory, run_rows


@pytest.fixture
def checkpoint(tmp_path):
    random_model("qwen2").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    random_model("qwen2").save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def all_tensors(decoder):
    weights = decoder.weights
    tables = [*weights.linears, weights.embedding]
    biases = [linear.bias for linear in weights.linears if linear.bias is not None]
    return [weights.norm, *biases, *(table.rows(torch.arange(table.shape[0])) for table in tables)]


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_shards_and_one_file_hold_the_same_decoder(tmp_path):
    model = random_model("qwen2")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    one, many = load_decoder(tmp_path / "one"), load_decoder(tmp_path / "many")
    assert all(torch.equal(a, b) for a, b in zip(all_tensors(one), all_tensors(many), strict=True))


def test_tensors_are_converted_one_by_one_to_the_wanted_dtype(checkpoint):
    wide, narrow = load_decoder(checkpoint), load_decoder(checkpoint, dtype=torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(all_tensors(wide), all_tensors(narrow), strict=True))


def test_a_tied_checkpoint_shares_one_tensor(tmp_path):
    random_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = load_decoder(tmp_path).weights
    assert weights.lm_head is weights.embedding


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_bytes_are_the_same_in_whatever_blocks_they_are_made(checkpoint, monkeypatch, dtype):
    """And the same as of the whole tensors; the rest of such a decoder is bfloat16."""
    whole = load_decoder(checkpoint, dtype=dtype).weights
    monkeypatch.setattr("tts_engine.models.weights.QUANTISED_ENTRIES", {"cpu": 500})
    few = load_decoder(checkpoint, dtype=dtype).weights
    wide, x = load_decoder(checkpoint).weights, torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("lm_head", "gate_up"):
        a, b, c = (getattr(w if name == "lm_head" else w.layers[0], name) for w in (whole, few, wide))
        assert torch.equal(a(x), b(x))
        assert 0 < (a(x, torch.float32) - c(x.float())).abs().max() < 0.06 * c(x.float()).abs().max()
    assert isinstance(whole.layers[0].down, Int8 if dtype == torch.int8 else Fp8)
    assert isinstance(whole.lm_head, Int8 if dtype == torch.int8 else Plain)
    assert whole.embedding.weight.dtype == whole.norm.dtype == whole.layers[0].mlp_norm.dtype == torch.bfloat16


def test_an_unused_lm_head_of_a_prm_is_not_read(checkpoint):
    edit_json(checkpoint / "config.json", lambda c: c.update(architectures=["Qwen2ForProcessRewardModel"]))
    assert load_decoder(checkpoint).weights.lm_head is None


def keep_bytes(count):
    return lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:count])


def list_shards(**names):
    return lambda d: (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names} if names else {}))


@pytest.mark.parametrize(("change", "words"), [
    (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    (lambda d: (d / "config.json").write_text("[]"), "config.json: expected a JSON object, got list"),
    (lambda d: edit_json(d / "config.json", lambda c: c.update(architectures=["MambaForCausalLM"])), "unknown architecture 'Mamba"),
    (lambda d: (d / "model.safetensors").unlink(), "expected model.safetensors or model.safetensors.index.json; neither"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only pytorch_model.bin, a pickle file: rewrite it with"),
    (lambda d: edit_tensors(d, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "no tensor 'model.layers.1.mlp.up_proj"),
    (lambda d: edit_tensors(d, lambda t: t.pop("lm_head.weight")), "no tensor 'lm_head.weight'; expected one of shape [97, 48]"),
    (lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(47)})), "has shape [47], expected [48]"),
    (lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(48).char()})), "stored as I8, expected one of"),
    (keep_bytes(-1000), "model.safetensors is damaged or cut short"),
    (keep_bytes(100), "model.safetensors is damaged or cut short"),
    (keep_bytes(0), "model.safetensors is damaged or cut short"),
    (list_shards(), 'expected an object "weight_map"'),
    (list_shards(a="model-9.safetensors"), "lists model-9.safetensors, which is not in"),
    (list_shards(a="../model.safetensors"), "lists the file '../model.safetensors'; expected a plain name"),
    (list_shards(**{"model.embed_tokens.weight": "config.json"}), "config.json is damaged or cut short"),
    (list_shards(a="model.safetensors"), "no tensor 'model.embed_tokens.weight'"),
])  # fmt: skip
def test_every_damage_is_one_sentence_with_the_path_and_what_was_expected(checkpoint, change, words):
    change(checkpoint)
    with pytest.raises(ModelError) as caught:
        load_decoder(checkpoint)
    message = str(caught.value)
    assert str(checkpoint) in message and words in message and "\n" not in message


def test_a_cut_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match=f"{shard.name} is damaged or cut short"):
        load_decoder(sharded)


def test_a_name_that_is_neither_directory_nor_hub_id_is_refused(tmp_path):
    assert resolve_checkpoint(tmp_path) == tmp_path
    for name in ("nowhere", "./no/where", "/no/where", "a/b/c", tmp_path / "gone"):
        with pytest.raises(ModelError, match="neither a directory nor a hub id"):
            resolve_checkpoint(name)


def test_an_uncached_hub_id_offline_is_one_sentence(tmp_path):
    code = ("from tts_engine.models.weights import resolve_checkpoint\nfrom tts_engine.errors import ModelError\n"
            "try: resolve_checkpoint('some-owner/some-model')\nexcept ModelError as error: print(error)")  # fmt: skip
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "some-owner/some-model" in done.stdout and done.stdout.count("\n") == 1 and not done.stderr


# Weights made up.


@pytest.fixture
def bare(tmp_path):
    """(family, sizes of its config) -> a directory with nothing but a config.json."""

    def make(family="qwen2", **sizes):
        model = random_model(family, **sizes)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "sizes"), [
    ("llama", {"tie_word_embeddings": True}), ("mistral", {}), ("qwen2", {}), ("qwen3", {"head_dim": 20}),
    ("qwen2", {"num_hidden_layers": 60}),
])  # fmt: skip
def test_made_up_weights_keep_activations_in_bounds(bare, family, sizes, dtype):
    decoder = load_decoder(RandomCheckpoint(bare(family, **sizes)), dtype=dtype)
    cache = poisoned_cache(decoder.spec, 40, dtype)
    logits = decoder.logits(run_rows(decoder, make_backend("reference"), cache, [list(range(40))], [40], [list(range(7, 47))]))
    assert logits.isfinite().all() and 0.3 < logits.std() < 3 and logits.std(0).min() > 0.1
    layer = decoder.weights.layers[-1]
    assert (layer.attention_norm == 1).all() and (layer.qk_norm is None or (layer.qk_norm == 1).all())
    assert all(part.bias is None or (part.bias == 0).all() for part in layer.heads)


def test_a_made_up_tensor_hangs_on_its_name_alone(bare):
    source = RandomCheckpoint(bare("qwen2", num_attention_heads=4, num_key_value_heads=4))

    def read(part, layer=1):
        tensor = torch.empty(48, 48)
        source.read_into(f"model.layers.{layer}.self_attn.{part}_proj.weight", tensor)
        return tensor

    first = {part: read(part) for part in "qkvo"}
    assert all(torch.equal(read(part), first[part]) for part in "ovkq")
    weights = load_decoder(source).weights.layers
    queries, keys_values = weights[1].heads
    assert torch.equal(queries.weight, first["q"]) and torch.equal(keys_values.weight, torch.cat([first[part] for part in "kv"]))
    assert torch.equal(weights[1].out.weight, first["o"])
    different = [*first.values(), read("q", 0)]
    assert all((a - b).abs().mean() > 0.05 for i, a in enumerate(different) for b in different[:i])
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(all_tensors(load_decoder(s)) for s in (RandomCheckpoint(source.directory), source)), strict=True)
    )


def test_without_weights_any_tensor_can_be_had_and_a_config_is_still_needed(bare, tmp_path):
    assert RandomCheckpoint(bare()).tensor_names is None
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        RandomCheckpoint(tmp_path)


def test_weights_without_a_place_to_be_are_one_sentence(bare):
    directory = bare()
    edit_json(directory / "config.json", lambda c: c.update(vocab_size=1 << 24, hidden_size=1 << 24, head_dim=12))
    with pytest.raises(ModelError, match=r"its weights, \d{16} bytes in all, cannot be held on cpu: ") as caught:
        load_decoder(RandomCheckpoint(directory))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("load", "wanted"), [("weights", True), ("random", False)])
def test_weights_are_downloaded_only_to_be_loaded(monkeypatch, load, wanted):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or ".")
    resolve_checkpoint("some-owner/some-model", load)
    assert ("*.safetensors" in asked) is wanted and {"*.json", "tokenizer.model"} <= set(asked)


def test_a_pair_without_weights_is_searched_and_its_record_says_so(tmp_path):
    policy, prm = tmp_path / "policy", tmp_path / "prm"
    random_policy_directory(policy)
    random_prm_directory(prm, "qwen2.5-math-prm")
    settings = {"load": "random", "kv_bytes": 4 << 20, "block_size": 4, "max_step_tokens": 8, "max_tokens": 40}
    method = BeamSearch(n=4, width=2, max_steps=3)

    def told():
        run = describe_run(policy=policy, prm=prm, config=EngineConfig(**settings), method=method, seed=0, task="t", split="test",
                           limit=None, problems=[])  # fmt: skip
        return {part: run[part] for part in ("engine", "policy", "prm")}

    before = told()
    for directory in (policy, prm):
        (directory / "model.safetensors").unlink()
    assert told() == before and before["engine"]["load"] == "random"
    assert before["policy"]["sha256"].keys() == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    drawn = []
    for _ in range(2):
        with Engine.from_pretrained(policy, prm, **settings) as engine:
            [result] = engine.search(["1+1?"], method)
            drawn.append([(node.identity, node.tokens, node.score) for node in result.nodes])
    assert drawn[0] == drawn[1] and len({score for *_, score in drawn[0]}) > 3 and all(0 < score < 1 for *_, score in drawn[0])


# The kernel's high-water mark of resident memory, file pages included. (ru_maxrss would start at the parent's: exec keeps it.)
PEAK = """
import re, sys, torch
from pathlib import Path
import transformers  # what a user has loaded anyway must not count
from tts_engine.models.weights import SOURCES, load_decoder, weight_bytes
def resident(mark):
    return int(re.search(mark + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
dtype = getattr(torch, sys.argv[2])
load_decoder(SOURCES[sys.argv[4]](Path(sys.argv[3])), dtype=dtype)  # a tiny one, for what the first load imports
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = resident("VmRSS")
decoder = load_decoder(SOURCES[sys.argv[4]](Path(sys.argv[1])), dtype=dtype)
print((resident("VmHWM") - before) / weight_bytes(decoder.spec, dtype))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "load"), [
    ("float32", "weights"), ("bfloat16", "weights"), ("bfloat16", "random"), ("int8", "weights"), ("int8", "random"),
    ("float8_e4m3fn", "weights"),
])  # fmt: skip
def test_loading_peaks_at_no_more_than_1_2_times_the_weights(tmp_path, dtype, load):
    random_model("qwen2").save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 20_000}
    model = random_model("qwen2", tie_word_embeddings=True, **sizes)  # 54 M parameters, 216 MB in float32
    model.save_pretrained(tmp_path / "big")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "big"), dtype, str(tmp_path / "tiny"), load]
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""}
    if dtype == "float8_e4m3fn":  # in a GPU's memory: here the C library would keep holes between so many matrices of a few MB
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert 0.9 <= float(done.stdout.split()[-1]) <= 1.2  # below: the mark missed the load
