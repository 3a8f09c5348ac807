"""What a decoder is, read from a Hugging Face config.json: numbers only, no tensors.

A family is one row of FAMILIES; what differs between families is a field of DecoderSpec, never a branch on a name elsewhere.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ModelError

LARGEST, MOST_LAYERS = 1 << 24, 1 << 12  # of any size in a config.json: beyond is no model but a mistake


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the architecture's name alone decides.

    unsaid: what a config.json means that leaves these keys out; fixed: keys at the value that holds whatever config.json says.
    Both are those of transformers' class of that name.
    """

    qkv_bias: bool = False  # q, k and v projections carry a bias
    qk_norm: bool = False  # q and k of each head go through an RMSNorm before they are rotated
    lm_head: bool = True  # hidden states are read through vocabulary rows; False: only through a head of its own
    unsaid: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    "LlamaForCausalLM": Family(unsaid={"max_position_embeddings": 2048}, fixed={"use_sliding_window": False, "layer_types": None}),
    "MistralForCausalLM": Family(
        unsaid={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        fixed={"use_sliding_window": True, "max_window_layers": 0, "layer_types": None},
    ),
    "Qwen2ForCausalLM": Family(qkv_bias=True, unsaid=_QWEN),
    "Qwen2ForProcessRewardModel": Family(qkv_bias=True, lm_head=False, unsaid=_QWEN),
    "Qwen2ForPrmModel": Family(qkv_bias=True, lm_head=False, unsaid=_QWEN),
    "Qwen3ForCausalLM": Family(qk_norm=True, unsaid=_QWEN | {"head_dim": 128}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's stretched rotary frequencies: wavelengths above `original_max / low` are divided by `factor`, those below
    `original_max / high` kept, those between interpolated."""

    factor: float
    low: float
    high: float
    original_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Sizes and switches of one pre-norm decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    qkv_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # by layer: how many tokens a token sees, itself the last; None: all up to itself
    lm_head: bool  # False: the checkpoint's hidden states are read by another head; there are no logits
    tied: bool  # logits read the embedding's rows
    max_positions: int
    stored_dtype: torch.dtype  # what the checkpoint says it was saved in

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str) -> "DecoderSpec":
        """Read a config.json's dictionary, as the hub's files write it or as transformers 5 does; `source` names it in errors.

        Raises ModelError for an unknown architecture, a missing or senseless size, or a feature this decoder does not have.
        """
        architecture = _architecture(config, source)
        family = FAMILIES[architecture]
        config = {**family.unsaid, **config, **family.fixed}
        hidden_size = _size(config, "hidden_size", source)
        num_heads = _size(config, "num_attention_heads", source)
        num_kv_heads = _size(config, "num_key_value_heads", source, num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(f"{source}: num_attention_heads={num_heads} must be a multiple of num_key_value_heads={num_kv_heads}")
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise ModelError(f"{source}: hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads}")
        head_dim = _size(config, "head_dim", source, hidden_size // num_heads)
        if head_dim % 2:
            raise ModelError(f"{source}: head_dim={head_dim} must be even for rotary positions")
        num_layers = _size(config, "num_hidden_layers", source, most=MOST_LAYERS)
        max_positions = _size(config, "max_position_embeddings", source)
        rope_theta, rope_scaling = _rope(config, max_positions, source)
        spec = cls(
            architecture=architecture,
            vocab_size=_size(config, "vocab_size", source),
            hidden_size=hidden_size,
            intermediate_size=_size(config, "intermediate_size", source),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(config, "rms_norm_eps", source, 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            windows=_windows(config, num_layers, max_positions, source),
            lm_head=family.lm_head,
            tied=family.lm_head and bool(config.get("tie_word_embeddings", False)),
            max_positions=max_positions,
            stored_dtype=_dtype(config, source),
        )
        _refuse_what_is_missing(config, spec, source)
        return spec

    @property
    def layer_weights(self) -> int:
        """Entries of one layer's matrices: what a token multiplies with there. Norms and biases are not in it."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the decoder reads from a checkpoint, by name. A PRM's own head is not among them."""
        d, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "post_attention_layernorm.weight": (d,),
            "mlp.gate_proj.weight": (inner, d),
            "mlp.up_proj.weight": (inner, d),
            "mlp.down_proj.weight": (d, inner),
        }
        if self.qkv_bias:
            layer |= {f"self_attn.{part}_proj.bias": (rows,) for part, rows in (("q", q), ("k", kv), ("v", kv))}
        if self.qk_norm:
            layer |= {f"self_attn.{part}_norm.weight": (self.head_dim,) for part in "qk"}
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.num_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (d,)
        if self.lm_head and not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes

    @property
    def num_parameters(self) -> int:
        """Exact count of the decoder's parameters: embedding, layers, norms, and the lm_head where it is not the embedding.

        A PRM's own head is not part of the decoder and not counted.
        """
        return sum(math.prod(shape) for shape in self.tensor_shapes.values())

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token through all layers' matrices: 2 per weight. Attention and the lm_head are counted apart."""
        return 2 * self.num_layers * self.layer_weights

    @property
    def flops_per_read(self) -> int:
        """Those of them that the last layer spends only on a token whose hidden state is read: all but its key and value."""
        keys_and_values = 2 * self.hidden_size * self.num_kv_heads * self.head_dim
        return 2 * (self.layer_weights - keys_and_values)

    @property
    def lm_head_flops(self) -> int:
        """FLOPs of the logits of one read position: 2 per vocabulary entry and hidden unit."""
        return 2 * self.vocab_size * self.hidden_size

    @property
    def attention_flops_per_pair(self) -> int:
        """FLOPs of one (query, key) pair in all layers: 2HD for the score and 2HD for the value, in each.

        Where a sliding window spares layers the pair, this counts them all the same.
        """
        return 4 * self.num_heads * self.head_dim * self.num_layers

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token keeps in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


def _architecture(config: Mapping[str, Any], source: str) -> str:
    names = config.get("architectures")
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(names, list) or not names:
        raise ModelError(f'{source} names no architecture; expected "architectures" to hold one of {known}')
    if not isinstance(names[0], str) or names[0] not in FAMILIES:
        raise ModelError(f"{source}: unknown architecture {names[0]!r}; supported: {known}")
    return names[0]


def _size(
    config: Mapping[str, Any], key: str, source: str, default: int | None = None, *, least: int = 1, most: int = LARGEST
) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ModelError(f"{source}: {key} must be a whole number from {least} to {most}, got {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"{source}: {key} must be a positive number, got {value!r}")
    return float(value)


def _windows(config: Mapping[str, Any], num_layers: int, max_positions: int, source: str) -> tuple[int | None, ...]:
    """Each layer's sliding window; None where there is none, or none that could bind within `max_positions`.

    Layers slide as `layer_types` says or, where it is absent, from number `max_window_layers` on.
    """
    full, sliding = "full_attention", "sliding_attention"
    kinds = config.get("layer_types")
    known = isinstance(kinds, list) and len(kinds) == num_layers and all(kind in (full, sliding) for kind in kinds)
    if kinds is not None and not known:
        raise ModelError(f"{source}: layer_types must name {full} or {sliding} for each of the {num_layers} layers")
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return (None,) * num_layers
    window = _size(config, "sliding_window", source)
    if window >= max_positions:
        return (None,) * num_layers
    if kinds is None:
        first = _size(config, "max_window_layers", source, least=0)
        kinds = [sliding if i >= first else full for i in range(num_layers)]
    return tuple(window if kind == sliding else None for kind in kinds)


def _rope(config: Mapping[str, Any], max_positions: int, source: str) -> tuple[float, Llama3Rope | None]:
    """rope_theta and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (hub files)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"{source}: the rotary settings must be an object, got {rope!r}")
    theta = _number(rope if rope.get("rope_theta") is not None else config, "rope_theta", source, 10_000.0)
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ModelError(f"{source}: rotary positions on a part of the head (partial_rotary_factor) are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(f"{source}: unknown rope type {kind!r}; supported: default, llama3")
    scaling = Llama3Rope(
        factor=_number(rope, "factor", source),
        low=_number(rope, "low_freq_factor", source),
        high=_number(rope, "high_freq_factor", source),
        original_max=_size(rope, "original_max_position_embeddings", source, max_positions),
    )
    if scaling.high <= scaling.low:
        raise ModelError(f"{source}: high_freq_factor={scaling.high} must exceed low_freq_factor={scaling.low}")
    return theta, scaling


def _dtype(config: Mapping[str, Any], source: str) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if not isinstance(name, str) or name not in dtypes:
        raise ModelError(f"{source}: unknown dtype {name!r}; known: {', '.join(sorted(dtypes))}")
    return dtypes[name]


def _refuse_what_is_missing(config: Mapping[str, Any], spec: DecoderSpec, source: str) -> None:
    """Flags of known families that would change the arithmetic and that this decoder does not act on."""
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{source}: hidden_act={config['hidden_act']!r} is not supported; expected 'silu'")
    for flag in ("attention_bias", "mlp_bias"):
        if config.get(flag):
            raise ModelError(f"{source}: {flag}=true is not supported for {spec.architecture}")
