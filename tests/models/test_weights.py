import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tts_engine.errors import ModelError
from tts_engine.models.weights import load_decoder, resolve_checkpoint
from tts_engine.testing import random_model


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
    layers = [t for layer in weights.layers for t in (layer.qkv, layer.qkv_bias, layer.out, layer.gate_up, layer.down)]
    return [weights.embedding, weights.norm, weights.lm_head, *layers]


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
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only pytorch_model.bin, a pickle file, and"),
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


# The kernel's high-water mark of resident memory, file pages included. (ru_maxrss would start at the parent's: exec keeps it.)
PEAK = """
import re, sys, torch
from pathlib import Path
import transformers  # what a user has loaded anyway must not count
from tts_engine.models.weights import load_decoder
def resident(mark):
    return int(re.search(mark + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
dtype = getattr(torch, sys.argv[2])
load_decoder(Path(sys.argv[3]), dtype=dtype)  # a tiny one, for what the first load imports
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = resident("VmRSS")
decoder = load_decoder(Path(sys.argv[1]), dtype=dtype)
print((resident("VmHWM") - before) / (decoder.spec.num_parameters * dtype.itemsize))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_peaks_at_no_more_than_1_2_times_the_weights(tmp_path, dtype):
    random_model("qwen2").save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 20_000}
    model = random_model("qwen2", tie_word_embeddings=True, **sizes)  # 54 M parameters, 216 MB in float32
    model.save_pretrained(tmp_path / "big")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "big"), dtype, str(tmp_path / "tiny")], capture_output=True,
                          text=True, check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""})  # fmt: skip
    assert 0.9 <= float(done.stdout.split()[-1]) <= 1.2  # below: the mark missed the load
