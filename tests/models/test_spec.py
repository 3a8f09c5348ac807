import json

import pytest
import torch
import transformers

from tts_engine.errors import ModelError
from tts_engine.models.decoder import rotary_frequencies
from tts_engine.models.spec import FAMILIES, DecoderSpec, Llama3Rope
from tts_engine.testing import LLAMA3_ROPE, random_model

HUB_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
HUB_QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "sliding_window": 32768,
    "max_window_layers": 21, "use_sliding_window": False, "attention_dropout": 0.0, "hidden_act": "silu",
}  # fmt: skip
THEIRS = {  # the class of transformers that reads each architecture's config.json
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen2ForProcessRewardModel": transformers.Qwen2Config,
    "Qwen2ForPrmModel": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}
PRM = {"architectures": ["Qwen2ForProcessRewardModel"], "auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"}}


def test_hub_configs_are_read_as_they_are_written():
    llama, qwen = DecoderSpec.from_hf(HUB_LLAMA, "config.json"), DecoderSpec.from_hf(HUB_QWEN, "config.json")
    assert llama.rope_theta == 5e5 and llama.rope_scaling == Llama3Rope(factor=32.0, low=1.0, high=4.0, original_max=8192)
    assert (llama.qkv_bias, llama.tied, llama.stored_dtype) == (False, True, torch.bfloat16)
    assert (qwen.qkv_bias, qwen.head_dim, qwen.rope_scaling) == (True, 64, None)


def test_the_counts_of_known_models():
    assert DecoderSpec.from_hf(HUB_LLAMA, "config.json").num_parameters == 1_235_814_400
    qwen = DecoderSpec.from_hf(HUB_QWEN, "config.json")
    assert qwen.num_parameters == 494_032_768
    assert qwen.kv_bytes_per_token(torch.bfloat16) == 2 * 24 * 2 * 64 * 2
    assert qwen.attention_flops_per_pair == 4 * 14 * 64 * 24
    assert qwen.lm_head_flops == 2 * 151936 * 896
    assert qwen.flops_per_token == 2 * 24 * (896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864)


def test_remote_code_of_a_known_architecture_is_ignored_and_its_decoder_has_no_vocabulary_head():
    spec = DecoderSpec.from_hf(HUB_QWEN | PRM, "config.json")
    assert spec.qkv_bias and not spec.lm_head and not spec.tied
    assert spec.num_parameters == 494_032_768


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "flags"), [
    ("llama", {"rope_parameters": LLAMA3_ROPE}), ("mistral", {"sliding_window": 9}), ("qwen2", {}), ("qwen3", {"head_dim": 20}),
])  # fmt: skip
def test_parameters_and_frequencies_equal_transformers(tmp_path, family, flags, tied):
    model = random_model(family, tie_word_embeddings=tied, **flags)
    model.save_pretrained(tmp_path)
    spec = DecoderSpec.from_hf(json.loads((tmp_path / "config.json").read_text()), "config.json")
    names = dict(model.named_parameters())  # tied ones once
    assert spec.tensor_shapes == {name: tuple(tensor.shape) for name, tensor in names.items()}
    assert spec.num_parameters == model.num_parameters()
    assert torch.equal(rotary_frequencies(spec), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("change", "words"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'; supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCau"),
    ({"architectures": None}, "names no architecture"),
    ({"architectures": [["LlamaForCausalLM"]]}, "unknown architecture ['LlamaForCausalLM']"),
    ({"hidden_size": None}, "hidden_size must be a whole number from 1 to 16777216, got None"),
    ({"num_hidden_layers": "many"}, "num_hidden_layers must be a whole number from 1 to 4096, got 'many'"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers must be a whole number from 1 to 4096, got 1000000000000"),
    ({"vocab_size": 10**9}, "vocab_size must be a whole number from 1 to 16777216, got 1000000000"),
    ({"intermediate_size": True}, "intermediate_size must be a whole number from 1 to 16777216, got True"),
    ({"num_key_value_heads": 3}, "num_attention_heads=14 must be a multiple of num_key_value_heads=3"),
    ({"hidden_size": 900}, "hidden_size=900 must be a multiple"),
    ({"head_dim": 63}, "head_dim=63 must be even"),
    ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
    ({"rope_theta": 10**400}, "rope_theta must be a positive number, got 1000"),
    ({"torch_dtype": "int4"}, "unknown dtype 'int4'"),
    ({"torch_dtype": ["float32"]}, "unknown dtype ['float32']"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias=true"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "unknown rope type 'yarn'; supported: default, llama3"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor must be a positive number, got None"),
    ({"rope_scaling": "llama3"}, "must be an object"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be a whole number from 1 to 16777216, got 0"),
    ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": -1}, "max_window_layers must be a whole number from"),
    ({"layer_types": ["full_attention"]}, "layer_types must name full_attention or sliding_attention for each of the 24 layers"),
    ({"layer_types": ["linear_attention"] * 24}, "layer_types must name full_attention or sliding_attention for each of the 24"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_in_a_sentence_with_the_file(change, words):
    with pytest.raises(ModelError) as caught:
        DecoderSpec.from_hf(HUB_QWEN | change, "some/config.json")
    assert words in str(caught.value) and str(caught.value).startswith("some/config.json")


MISTRAL = {"architectures": ["MistralForCausalLM"]}
KINDS = ["sliding_attention", "full_attention"] * 12


@pytest.mark.parametrize(("change", "windows"), [
    ({"use_sliding_window": False}, [None] * 24),
    ({}, [None] * 21 + [4096] * 3),
    ({"max_window_layers": 24}, [None] * 24),
    ({"max_window_layers": 0}, [4096] * 24),
    ({"layer_types": KINDS}, [4096, None] * 12),
    ({"layer_types": KINDS, "use_sliding_window": False}, [None] * 24),
    ({"sliding_window": None}, [None] * 24),
    ({"sliding_window": 32768}, [None] * 24),  # as long as the positions: it never binds
    ({"sliding_window": 32767}, [None] * 21 + [32767] * 3),
    (MISTRAL | {"use_sliding_window": False}, [4096] * 24),  # what it does not know it does not heed
    (MISTRAL | {"layer_types": KINDS}, [4096] * 24),
    (MISTRAL | {"sliding_window": None}, [None] * 24),
    ({"architectures": ["LlamaForCausalLM"]}, [None] * 24),
])  # fmt: skip
def test_the_layers_that_slide_are_those_of_transformers(change, windows):
    config = HUB_QWEN | {"use_sliding_window": True, "sliding_window": 4096} | change
    assert list(DecoderSpec.from_hf(config, "config.json").windows) == windows
    theirs = THEIRS[config["architectures"][0]](**config)
    alike = {"mistral": ["sliding_attention"] * 24, "llama": [None] * 24}
    kinds = alike.get(theirs.model_type) or theirs.layer_types
    sliding = theirs.sliding_window if (theirs.sliding_window or 32768) < 32768 else None
    assert windows == [sliding if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_what_a_config_leaves_unsaid_is_what_transformers_takes_it_to_be(architecture):
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 32}
    spec = DecoderSpec.from_hf({"architectures": [architecture], **sizes}, "config.json")
    theirs = THEIRS[architecture](**sizes)
    assert spec.max_positions == theirs.max_position_embeddings and spec.rms_norm_eps == theirs.rms_norm_eps
    assert spec.num_kv_heads == theirs.num_key_value_heads and spec.tied == theirs.tie_word_embeddings
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 2) and spec.rope_theta == theirs.rope_parameters["rope_theta"]
    assert set(spec.windows) == ({4096} if theirs.model_type == "mistral" else {None})
