"""The models that contenders run: a policy and a PRM of Qwen2.5-0.5B's shape with random weights, or a slice of it.

A slice keeps every width: it has so many of the 24 layers, and the same part of the vocabulary, so that layers and logits share
the work as in the whole model. Only what is there once a forward, in every engine, weighs more in it.
"""

import json
from pathlib import Path
from typing import Any

from tts_engine.testing import tiny_tokenizer

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
    "tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768,
    "use_sliding_window": False,
}  # fmt: skip
FAMILY = "rlhflow"  # a PRM that is a whole causal language model: read with a loop, it computes a vocabulary of logits a token
CHAT = "{% for message in messages %}<|turn|>{{ message['content'] }}<|end|>{% endfor %}"
STEP_LETTERS = "a0b1c2d3e4f5g6h7i8j9"  # which no tokenizer joins, as in steps of a drawn length


def sliced(layers: int) -> dict[str, Any]:
    """SHAPE with that many layers."""
    part = layers / SHAPE["num_hidden_layers"]
    return SHAPE | {"num_hidden_layers": layers, "vocab_size": round(part * SHAPE["vocab_size"])}


def make_models(directory: Path, layers: int) -> tuple[Path, Path]:
    """Directories of a policy and of a PRM, configs and a made-up tokenizer, to be loaded with random weights."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    paths = []
    for name, more in (("policy", {}), ("prm", {"prm_family": FAMILY})):
        paths.append(directory / name)
        paths[-1].mkdir(parents=True)
        (paths[-1] / "config.json").write_text(json.dumps(sliced(layers) | more))
        tokenizer.save_pretrained(paths[-1])
    return paths[0], paths[1]


def text_of(length: int) -> str:
    """That many tokens of text."""
    return (STEP_LETTERS * (length // len(STEP_LETTERS) + 1))[:length]
