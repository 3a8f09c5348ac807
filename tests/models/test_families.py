"""The published checkpoints by their true configs: what is read, every tensor, and shrunk ones with their flags in parity."""

import json
import math
from functools import partial

import pytest
import torch
import transformers

from tts_engine.attention import make_backend
from tts_engine.embedded.tokenizer import END, build_tokenizer, save_tokenizer
from tts_engine.engine import Engine
from tts_engine.errors import EngineError, ModelError
from tts_engine.models.decoder import rotary_frequencies
from tts_engine.models.spec import FAMILIES, DecoderSpec
from tts_engine.models.weights import load_decoder
from tts_engine.search import Cot
from tts_engine.testing import poisoned_cache, random_model, run_rows

POLICIES = [
    *(f"meta-llama/Llama-3.{name}-Instruct" for name in ("2-1B", "2-3B", "1-8B", "3-70B")),
    *(f"meta-llama/Llama-3.1-{size}B" for size in ("8", "70", "405")),
    *(f"Qwen/Qwen2.5-{size}B-Instruct" for size in ("0.5", "1.5", "3", "7", "14", "32", "72")),
    *(f"Qwen/Qwen2.5-Math-{size}B-Instruct" for size in ("1.5", "7", "72")),
    *(f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}B" for size in ("1.5", "7")),
    *(f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14", "32")),
    "mistralai/Mistral-7B-v0.1",
    *(f"HuggingFaceTB/SmolLM2-{size}M-Instruct" for size in ("135", "360")),
]  # fmt: skip
PRMS = [
    "peiyi9979/math-shepherd-mistral-7b-prm",
    *(f"RLHFlow/Llama3.1-8B-PRM-{data}-Data" for data in ("Mistral", "Deepseek")),
    *(f"Skywork/Skywork-o1-Open-PRM-Qwen-2.5-{size}B" for size in ("1.5", "7")),
    *(f"Qwen/Qwen2.5-Math-{name}" for name in ("PRM-7B", "PRM-72B", "7B-PRM800K")),
]
OTHERS = ["Qwen/Qwen2.5-Math-RM-72B", "infly/Universal-PRM-7B", "Qwen/Qwen3-30B-A3B", "HuggingFaceTB/SmolLM3-3B",
          "google/gemma-3-1b-it", "microsoft/Phi-4-mini-instruct", "openai/gpt-oss-20b", "openai/gpt-oss-120b"]  # fmt: skip
SLIDING = ["mistralai/Mistral-7B-v0.1", "peiyi9979/math-shepherd-mistral-7b-prm"]
# What the developers' table says of a model beside what its config.json holds.
REMARKS = {"attention_bias", "qk_norm", "head", "confidence", "source", "note"}
PROMPTS, NUM_GREEDY = ["a=3;b=a+4;b?", "7*8;x=9;x-1?", "k=1;l=k;m=l?"], 64  # as many tokens each, to be one batch
published = pytest.mark.parametrize("name", POLICIES + PRMS)


@pytest.fixture(scope="module")
def table(shared):
    return json.loads((shared / "model_configs" / "model_configs.json").read_text(encoding="utf-8"))["models"]


def config_of(entry):
    """As the hub's config.json has it: Llama's and Mistral's know no use_sliding_window."""
    gone = REMARKS | ({"use_sliding_window"} if entry["model_type"] in ("llama", "mistral") else set())
    return {key: value for key, value in entry.items() if key not in gone}


def shrunk(entry, vocab_size):
    """Small sizes and short positions under the same flags: what was stretched, tied, grouped or made to slide still is."""
    group = entry["num_attention_heads"] // entry["num_key_value_heads"]
    width = math.gcd(entry["num_attention_heads"] * entry["head_dim"], entry["hidden_size"])
    wide, hidden = entry["num_attention_heads"] * entry["head_dim"] // width, entry["hidden_size"] // width
    scale = math.lcm(wide, 2 * group * 6) // wide
    small = {"num_attention_heads": 2 * group, "num_key_value_heads": 2, "head_dim": wide * scale // (2 * group),
             "hidden_size": hidden * scale, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": vocab_size,
             "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
    config = config_of(entry) | small
    if entry["rope_scaling"]:
        config["rope_scaling"] = entry["rope_scaling"] | {"original_max_position_embeddings": 32}
    if entry["use_sliding_window"]:
        config["sliding_window"] = 16
    return {key: value for key, value in config.items() if key not in ("architectures", "model_type", "dtype", "auto_map")}


def test_the_table_holds_no_other_models(table):
    assert sorted(table) == sorted(POLICIES + PRMS + OTHERS)


@published
def test_the_spec_of_a_published_config_is_what_is_known_of_the_model(table, name):
    entry = table[name]
    spec = DecoderSpec.from_hf(config_of(entry), name)
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size, spec.vocab_size) == tuple(
        entry[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"))  # fmt: skip
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == tuple(
        entry[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))  # fmt: skip
    assert (spec.qkv_bias, spec.qk_norm) == (entry["attention_bias"]["qkv"], entry["qk_norm"])
    assert (spec.rms_norm_eps, spec.rope_theta) == (entry["rms_norm_eps"], entry["rope_theta"])
    assert (spec.rope_scaling is None) == (entry["rope_scaling"] is None)
    assert spec.tied == (entry["tie_word_embeddings"] and spec.lm_head) and spec.stored_dtype == torch.bfloat16
    assert set(spec.windows) == ({4096} if name in SLIDING else {None})


@published
def test_every_tensor_of_a_published_model_is_named_with_its_shape(table, name):
    entry = table[name]
    spec = DecoderSpec.from_hf(config_of(entry), name)
    config = transformers.AutoConfig.for_model(**{key: value for key, value in config_of(entry).items() if key != "dtype"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if spec.tied or not spec.lm_head:
        del theirs["lm_head.weight"]
    assert spec.tensor_shapes == theirs
    assert spec.num_parameters == sum(map(math.prod, theirs.values()))
    head = {name: tuple(shape) for name, shape in entry.get("head", {}).get("tensors", {}).items()}
    assert not head.keys() & theirs.keys() and spec.lm_head == (not head)
    if name == "Qwen/Qwen2.5-Math-PRM-7B":  # loaded by others as so many tensors
        assert len(theirs | head) == 342


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_told_which_ones_are_supported(table, name):
    with pytest.raises(ModelError) as caught:
        DecoderSpec.from_hf(table[name], name)
    architecture = table[name]["architectures"][0]
    assert str(caught.value) == f"{name}: unknown architecture {architecture!r}; supported: {', '.join(sorted(FAMILIES))}"


# Shrunk checkpoints with the flags of the published ones. Many share all their flags, and then the files and the verdict.


def random_checkpoint(directory, entry):
    """(transformers model, directory) of a shrunk one with the embedded tokenizer, whose greedy text does not end."""
    tokenizer = build_tokenizer()
    model = random_model(entry["model_type"], **shrunk(entry, tokenizer.get_vocab_size()))
    with torch.no_grad():  # tokens count for less and the context for more, or a text would soon say one thing again and again
        model.model.embed_tokens.weight *= 0.1
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 4
            layer.self_attn.o_proj.weight *= 4
        model.lm_head.weight[tokenizer.token_to_id(END)] = 0
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def logit_error(model, directory, backend):
    """max|a-b| / max|b| of the logits of 3 paths of 53 tokens at most, against transformers, in float32."""
    decoder, attention = load_decoder(directory), make_backend(backend)
    random = torch.Generator().manual_seed(1)
    tokens = [torch.randint(decoder.spec.vocab_size, (length,), generator=random).tolist() for length in (1, 30, 53)]
    slots = [list(range(start, start + len(path))) for start, path in zip((80, 40, 100), tokens, strict=True)]
    hidden = run_rows(decoder, attention, poisoned_cache(decoder.spec, 160), slots, [len(path) for path in tokens], tokens)
    with torch.no_grad():
        ref = torch.cat([model(torch.tensor([path])).logits[0] for path in tokens])
    return float((decoder.logits(hidden) - ref).abs().max() / ref.abs().max())


def greedy_tokens(model, directory, backend):
    """The engine's greedy tokens and transformers', [NUM_GREEDY] of each of the PROMPTS."""
    limits = {"max_tokens": NUM_GREEDY, "max_step_tokens": NUM_GREEDY, "block_size": 4, "kv_bytes": 4 << 20}
    with Engine.from_pretrained(directory, backend=backend, **limits) as engine:
        paths = [result.branches[0].path for result in engine.search(PROMPTS, Cot(max_steps=NUM_GREEDY))]
    prompts = torch.tensor([path[0].tokens for path in paths])
    out = [[token for step in path[1:] for token in step.tokens] for path in paths]
    ref = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, eos_token_id=None, pad_token_id=1,
                         max_new_tokens=NUM_GREEDY)  # fmt: skip
    return out, ref[:, prompts.shape[1] :].tolist()


@pytest.fixture(scope="module")
def parity(table, tmp_path_factory):
    """name -> [logit error by backend], (the engine's greedy tokens, transformers')."""
    measured = {}

    def measure(name):
        entry = table[name]
        flags = json.dumps([entry["model_type"], shrunk(entry, 64)], sort_keys=True)
        if flags not in measured:
            directory = tmp_path_factory.mktemp("shrunk")
            model = random_checkpoint(directory, entry)
            slides = name in SLIDING
            errors = [logit_error(model, directory, backend) for backend in ("reference", "per_branch")[: 1 if slides else 2]]
            measured[flags] = errors, greedy_tokens(model, directory, "reference" if slides else None)
        return measured[flags]

    return measure


@published
def test_a_shrunk_one_with_the_same_flags_has_transformers_logits_and_greedy_text(parity, name):
    errors, (out, ref) = parity(name)
    assert max(errors) <= 1e-4
    assert out == ref and all(len(tokens) == NUM_GREEDY for tokens in out)
    assert len({token for tokens in out for token in tokens}) > 4


@published
def test_a_shrunk_one_keeps_the_flags_that_it_is_to_test(table, name):
    entry = table[name]
    small = shrunk(entry, 64) | {"architectures": entry["architectures"]}
    spec, whole = DecoderSpec.from_hf(small, name), DecoderSpec.from_hf(config_of(entry), name)
    flags = ("qkv_bias", "qk_norm", "tied", "lm_head", "rms_norm_eps", "rope_theta")
    assert all(getattr(spec, flag) == getattr(whole, flag) for flag in flags)
    ratio = [s.num_heads * s.head_dim / s.hidden_size for s in (spec, whole)]
    assert ratio[0] == ratio[1] and spec.num_heads // spec.num_kv_heads == whole.num_heads // whole.num_kv_heads
    assert [s.rope_scaling and s.rope_scaling.factor for s in (spec, whole)] == [(entry["rope_scaling"] or {}).get("factor")] * 2
    assert any(spec.windows) == any(whole.windows) == (name in SLIDING)
    theirs = transformers.AutoConfig.for_model(entry["model_type"], **shrunk(entry, 64))
    ref = transformers.AutoModelForCausalLM.from_config(theirs).model.rotary_emb.inv_freq
    assert torch.equal(rotary_frequencies(spec), ref)


@pytest.mark.parametrize("name", ["Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "Qwen/Qwen2.5-Math-PRM-7B"])
def test_hidden_states_of_a_reward_model_without_a_vocabulary_head_are_transformers(table, tmp_path, name):
    model = random_checkpoint(tmp_path, table[name])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": table[name]["architectures"]}))
    decoder, path = load_decoder(tmp_path), list(range(2, 42))
    assert decoder.weights.lm_head is None
    out = run_rows(decoder, make_backend("per_branch"), poisoned_cache(decoder.spec, 40), [list(range(40))], [40], [path])
    with torch.no_grad():
        ref = model.model(torch.tensor([path])).last_hidden_state[0]
    assert (out - ref).abs().max() <= 1e-4 * ref.abs().max()


def test_a_window_that_binds_is_refused_before_weights_are_read_unless_the_backend_has_it(table, tmp_path):
    random_checkpoint(tmp_path, table[SLIDING[0]])
    (tmp_path / "model.safetensors").unlink()
    load = partial(Engine.from_pretrained, tmp_path, load="random")
    for backend in (None, "per_branch"):
        with pytest.raises(EngineError, match=r"sliding window of 16 tokens, which attention backend '\w+' does not have: use ref"):
            load(backend=backend)
    load(backend="reference").close()
