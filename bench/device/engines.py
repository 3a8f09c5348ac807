"""Engines and models with weights made up, on the bench's device."""

from pathlib import Path
from typing import Any

import torch

from tts_engine.engine import Engine
from tts_engine.models.weights import RandomCheckpoint

from .setting import Bench

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def language_model(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model with the weights that ours makes up on that device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype, attn_implementation="sdpa")
    checkpoint = RandomCheckpoint(directory)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            checkpoint.read_into(name, tensor)
    return model.eval()


def load(bench: Bench, *directories: Path, **settings: Any) -> Engine:
    """An engine on the bench's device, with weights made up unless said otherwise."""
    given = {"load": "random", "device": str(bench.device), "backend": bench.backend, "system": ""}
    return Engine.from_pretrained(*directories, **given | settings)
