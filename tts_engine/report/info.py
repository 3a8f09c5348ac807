"""What an installation is, and what a model is before any of its weights are read."""

import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from ..config import DTYPES
from ..errors import ModelError
from ..models.linear import activations
from ..models.spec import DecoderSpec
from ..models.weights import read_json, weight_bytes
from .text import harmless, short
from .versions import package_version

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton", "math-verify", "matplotlib")
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")


def installation() -> dict[str, Any]:
    """Versions, threads, what the CPU can do, and whether the extension is there."""
    return {
        "tts_engine": package_version("tts-engine"),
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _cpu_flags()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "extension": importlib.util.find_spec("tts_engine._C") is not None,
    }


def model(name: str, path: Path | None) -> dict[str, Any]:
    """A checkpoint by its config.json alone: `path` is that file or its directory; None asks the hub for that one file of `name`.

    Raises ModelError where there is none, or none of a known architecture.
    """
    if path is None:
        path = _from_hub(name)
    elif path.is_dir():
        path = path / "config.json"
    spec = DecoderSpec.from_hf(read_json(path), str(path))
    return {
        "name": name,
        "architecture": spec.architecture,
        "parameters": spec.num_parameters,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "positions": spec.max_positions,
        "weight_bytes": {name: weight_bytes(spec, dtype) for name, dtype in DTYPES.items()},
        "kv_bytes_per_token": {name: spec.kv_bytes_per_token(activations(dtype)) for name, dtype in DTYPES.items()},
        "flops_per_token": spec.flops_per_token,
        "flops_per_logits": spec.lm_head_flops if spec.lm_head else 0,
        "flops_per_attended_token": spec.attention_flops_per_pair,
    }


def room(models: list[dict[str, Any]], memory: int | None) -> dict[str, Any]:
    """What these models take together, by dtype; with `memory` bytes, whether they fit and the KV tokens each then has room for.

    Weights and KV only: a PRM's own head, activations and whatever else runs there are not counted.
    """
    by_dtype = {}
    for dtype in DTYPES:
        weights = sum(model["weight_bytes"][dtype] for model in models)
        token = sum(model["kv_bytes_per_token"][dtype] for model in models)
        tokens = max(0, memory - weights) // token if memory is not None else None
        by_dtype[dtype] = {"weight_bytes": weights, "fits": tokens > 0 if tokens is not None else None, "kv_tokens": tokens}
    return {"memory_bytes": memory, "dtypes": by_dtype}


def installation_table(installation: dict[str, Any]) -> Table:
    shown = Table.grid(padding=(0, 2))
    for name, value in installation.items():
        shown.add_row(name, Text(_told(value)))
    return shown


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else "none" if value is None else str(value)


def model_table(models: list[dict[str, Any]]) -> Table:
    """A PRM's own head is not counted among the parameters; attention's FLOPs are for every earlier token that a token sees."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["model,\narchitecture", "parameters", "layers", "width", "heads\n/ KV", "KV bytes/token\nfloat32 / bfloat16",
                "FLOPs/token\nlayers", "FLOPs\nlogits", "FLOPs/attended\ntoken"]  # fmt: skip
    for i, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold", vertical="bottom")
    for model in models:
        kv = " / ".join(short(model["kv_bytes_per_token"][dtype]) for dtype in ("float32", "bfloat16"))
        flops = [short(model[f"flops_per_{what}"]) for what in ("token", "logits", "attended_token")]
        sizes = [short(model["parameters"]), *(str(model[size]) for size in ("layers", "hidden_size"))]
        sizes.append(f"{model['heads']} / {model['kv_heads']}")
        shown.add_row(*(Text(cell) for cell in (f"{harmless(model['name'])}\n{model['architecture']}", *sizes, kv, *flops)))
    return shown


def room_table(room: dict[str, Any]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["together", "weights, bytes"]
    if room["memory_bytes"] is not None:
        headings += [f"fit {short(room['memory_bytes'])}B", "KV tokens beside them,\nin each model"]
    for i, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if i == 0 else "right", vertical="bottom")
    for dtype, held in room["dtypes"].items():
        cells = [dtype, short(held["weight_bytes"])]
        shown.add_row(*cells, *([_told(held["fits"]), short(held["kv_tokens"])] if room["memory_bytes"] is not None else []))
    return shown


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # a dozen types, from a bad id to a network that is not there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} is no directory, and its config.json could not be had from the hub: {reason}") from error


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
