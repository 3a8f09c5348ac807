"""Everything about an engine that is not a model, and what of the memory that it has is for keys and values."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from .attention import make_backend
from .errors import EngineError
from .kv.budget import BALANCE, Costs, divide, proposed, read_memory
from .models.linear import activations
from .models.spec import DecoderSpec
from .models.weights import SOURCES, weight_bytes
from .policy import MAX_PREFILL
from .steps import check_mode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
ONLY_ON = {"int8": "cpu", "fp8": "cuda"}  # kind of device that a dtype is made for

MOST_ROWS = 1 << 16
KV_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything about an engine that is not a model.

    dtype: of weights, activations, keys and values, None for float32 on a CPU and bfloat16 on a GPU; "int8", on a CPU only: bytes
    multiplied with bytes, all else bfloat16; "fp8", on a GPU only: 8-bit floats in all layers, lm_head and all else bfloat16.
    memory: what weights, keys and values of both models and the workspace may come to together: bytes, "20GB", or a share of
    the device such as "80%". kv_bytes: instead, keys and values alone, 512 MiB where neither is given. How they are split between
    the models is for demand to say, see kv/budget.py. block_size: tokens a block; 4 or 8 where steps are a dozen tokens.
    max_rows: draws decoded side by side. max_step_tokens, max_tokens: where a step and a
    whole solution are cut. system: a system message, "" for none; None asks as the policy's family is used to, see
    tasks/prompts.py. steps: what closes a step, one of steps.STEP_MARKERS; a number, as in steps="50", makes steps of as many
    tokens on average whatever they say, for benchmarks. deterministic: a search's tokens never depend on what runs beside it,
    nor on evictions; slower. speculate: rows that would stand idle draw the next steps of the likeliest children while their
    siblings are still drawn; no result depends on it. timeout: seconds that a problem's search may take, others beside it, before
    it is given up. load: "random" makes the weights up, so that a config.json and a tokenizer are enough.
    """

    load: str = "weights"
    dtype: str = None  # type: ignore[assignment]  # always a name once made
    device: str = "cpu"
    backend: str | None = None  # None: "native" on a CPU, "triton_tree" elsewhere
    memory: int | str | None = None
    kv_bytes: int = None  # type: ignore[assignment]  # always a number once made, but beside `memory`
    block_size: int = 16
    max_rows: int = 512
    max_step_tokens: int = 2048
    max_tokens: int = 8192
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    system: str | None = None
    steps: str = "blank-line"
    prm_family: str | None = None
    deterministic: bool = False
    speculate: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.load not in SOURCES:
            raise EngineError(f"load={self.load!r} is unknown; known: {', '.join(SOURCES)}")
        kind = self.device.partition(":")[0]
        if self.dtype is None:
            object.__setattr__(self, "dtype", "float32" if kind == "cpu" else "bfloat16")
        if self.dtype not in DTYPES:
            raise EngineError(f"no dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if ONLY_ON.get(self.dtype, kind) != kind:
            on, instead = ("CPU", "bfloat16 or fp8") if kind == "cuda" else ("GPU", "bfloat16 or int8")
            raise EngineError(f"dtype {self.dtype} runs on a {on} only, not on {self.device}: use {instead}")
        if kind != "cpu" and find_spec("triton") is None:
            raise EngineError(f"device {self.device} needs Triton: pip install 'tts-engine[gpu]'")
        check_mode(self.steps)
        if self.memory is None:
            object.__setattr__(self, "kv_bytes", KV_BYTES if self.kv_bytes is None else self.kv_bytes)
        elif self.kv_bytes is not None:
            raise EngineError("memory and kv_bytes both say how much there is: give one of them")
        else:
            read_memory(self.memory, lambda: 100)
        for name in ("kv_bytes", "block_size", "max_rows", "max_step_tokens", "max_tokens"):
            if (getattr(self, name) or 0) < 1 and not (name == "kv_bytes" and self.memory is not None):
                raise EngineError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_rows > MOST_ROWS:
            raise EngineError(f"max_rows={self.max_rows} is more than the {MOST_ROWS} that a batch can have")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise EngineError(f"timeout={self.timeout} must be a number of seconds above 0")
        make_backend(self.attention, self.device, deterministic=self.deterministic)

    @property
    def attention(self) -> str:
        return self.backend or ("native" if self.device == "cpu" else "triton_tree")


def first_split(config: EngineConfig, specs: Sequence[DecoderSpec]) -> list[int]:
    """Blocks of the policy, and of the PRM where there is one. Raises EngineError where there is no room for them."""
    dtype, kind = DTYPES[config.dtype], config.device.partition(":")[0]
    costs = [Costs(weight_bytes=weight_bytes(spec, dtype), token_flops=spec.flops_per_token,
                   token_bytes=spec.kv_bytes_per_token(activations(dtype))) for spec in specs]  # fmt: skip
    room, blocks = kv_room(config, specs), [cost.token_bytes * config.block_size for cost in costs]
    if room < sum(blocks):
        given = f"memory={config.memory} leaves {room} bytes for keys and values, which" if config.memory else f"kv_bytes={room}"
        over = " over both models" if len(specs) > 1 else ""
        raise EngineError(f"{given} holds no block of {config.block_size} tokens: one takes {sum(blocks)} bytes{over}")
    if len(specs) == 1:
        return divide(room, room, blocks)
    return divide(room, proposed(costs[0], costs[1], room, max_rows=config.max_rows, balance=BALANCE[kind]), blocks)


def kv_room(config: EngineConfig, specs: Sequence[DecoderSpec]) -> int:
    """Bytes for keys and values: kv_bytes, or what weights and workspace leave of the memory. Raises EngineError."""
    if config.memory is None:
        return config.kv_bytes
    dtype = DTYPES[config.dtype]
    memory = read_memory(config.memory, lambda: device_memory(config.device))
    weights, work = sum(weight_bytes(spec, dtype) for spec in specs), workspace(config, specs)
    if memory <= weights + work:
        raise EngineError(f"memory={config.memory} is too little: weights take {weights / 1e9:.2f} GB and the workspace "
                          f"{work / 1e9:.2f} GB before any key or value")  # fmt: skip
    return memory - weights - work


def workspace(config: EngineConfig, specs: Sequence[DecoderSpec]) -> int:
    """Bytes that the largest forward takes beside weights, keys and values, about: what is between two layers and within one, and
    logits of all rows with their noise. One model works at a time, in what the other has left."""
    tokens, size = MAX_PREFILL + config.max_rows, activations(DTYPES[config.dtype]).itemsize
    within = max(tokens * (4 * spec.hidden_size + 3 * spec.intermediate_size) * size for spec in specs)
    return within + 2 * config.max_rows * specs[0].vocab_size * 4


def device_memory(device: str) -> int:
    """All bytes of the device's memory, whoever has them."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
