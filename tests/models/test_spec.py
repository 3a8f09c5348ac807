import json

import pytest
import torch

from tts_engine.errors import ModelError
from tts_engine.models.decoder import rotary_frequencies
from tts_engine.models.spec import DecoderSpec, Llama3Rope
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
@pytest.mark.parametrize(("family", "flags"), [("llama", {"rope_parameters": LLAMA3_ROPE}), ("qwen2", {})])
def test_parameters_and_frequencies_equal_transformers(tmp_path, family, flags, tied):
    model = random_model(family, tie_word_embeddings=tied, **flags)
    model.save_pretrained(tmp_path)
    spec = DecoderSpec.from_hf(json.loads((tmp_path / "config.json").read_text()), "config.json")
    assert spec.num_parameters == model.num_parameters()
    assert torch.equal(rotary_frequencies(spec), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("change", "words"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'; supported: LlamaForCausalLM, Qwen2ForCausalLM, "),
    ({"architectures": None}, "names no architecture"),
    ({"hidden_size": None}, "hidden_size must be a positive whole number, got None"),
    ({"num_hidden_layers": "many"}, "num_hidden_layers must be a positive whole number, got 'many'"),
    ({"num_key_value_heads": 3}, "num_attention_heads=14 must be a multiple of num_key_value_heads=3"),
    ({"hidden_size": 900}, "hidden_size=900 must be a multiple"),
    ({"head_dim": 63}, "head_dim=63 must be even"),
    ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
    ({"torch_dtype": "int4"}, "unknown dtype 'int4'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias=true"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "unknown rope type 'yarn'; supported: default, llama3"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor must be a positive number, got None"),
    ({"rope_scaling": "llama3"}, "must be an object"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"use_sliding_window": True, "sliding_window": 4096}, "a sliding window of 4096 tokens would bind within 32768 positions"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_in_a_sentence_with_the_file(change, words):
    with pytest.raises(ModelError) as caught:
        DecoderSpec.from_hf(HUB_QWEN | change, "some/config.json")
    assert words in str(caught.value) and str(caught.value).startswith("some/config.json")


@pytest.mark.parametrize("change", [{"sliding_window": 32768}, {"max_window_layers": 24}, {"layer_types": ["full_attention"] * 24}])
def test_a_sliding_window_that_never_binds_is_fine(change):
    DecoderSpec.from_hf(HUB_QWEN | {"use_sliding_window": True, "sliding_window": 4096} | change, "config.json")
