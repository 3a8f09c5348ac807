"""One decoder for many families: tensors in, hidden states out. What differs between families is in its DecoderSpec.

Knows nothing of branches or text: which slot is whose is the layout's business, attention is the backend's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.base import AttentionBackend
from ..kv.cache import KVCache
from .linear import Linear, Table
from .ops import ops_for
from .spec import DecoderSpec

# Rows of every deterministic GEMM. A whole number of vector registers for any column count, so that no element of a tile is
# computed by the scalar tail of a vector loop, whose exp may differ in the last bit.
ROW_TILE = 32
ROTARY_BLOCK = 1024  # positions by which the rotary tables grow


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer; d hidden, I intermediate. Fused matrices hold their parts one after the other along dimension 0."""

    attention_norm: Tensor  # [d]
    heads: tuple[Linear, ...]  # [(H + 2K) D, d]; of the last layer the queries' [H D, d], then the keys' and values' [2K D, d]
    qk_norm: Tensor | None  # [H + K, D], of the query heads, then of the key heads
    out: Linear  # [d, H D]
    mlp_norm: Tensor  # [d]
    gate_up: Linear  # [2 I, d]
    down: Linear  # [d, I]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All tensors of a decoder on one device; what is no matrix to be multiplied with is of one dtype, that of the activations."""

    embedding: Table  # [V, d]
    layers: list[LayerWeights]
    norm: Tensor  # [d]
    lm_head: Linear | None  # [V, d]; None where the checkpoint has no use for it
    head_row: Callable[[int], Tensor] | None  # a token's row [d] of the lm_head before any quantising

    @property
    def linears(self) -> list[Linear]:
        matrices = [m for layer in self.layers for m in (*layer.heads, layer.out, layer.gate_up, layer.down)]
        return matrices if self.lm_head is None else [*matrices, self.lm_head]


class Decoder:
    """A decoder's forward, in inference only.

    With `deterministic`, a row's bits depend on nothing but that row: where a matrix does not see to that, all work outside
    attention is done on tiles of ROW_TILE rows, zero-padded, so that every GEMM has the same shape whatever the batch. Attention
    must then be batch-invariant too. Bits may still differ between machines, numbers of threads, and versions of PyTorch.
    """

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, *, deterministic: bool = False) -> None:
        self.spec, self.weights = spec, weights
        self._tiled = deterministic and not all(linear.by_row for linear in weights.linears)
        self._rotary = _RotaryTables(spec, self.device)
        self._ops = ops_for(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.norm.device

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, *, cache: KVCache, backend: AttentionBackend, plan: Any,
                read_at: Tensor, read_plan: Any) -> Tensor:  # fmt: skip
        """Run T new tokens, store their keys and values, and return the final-normed hidden states at R of them.

        token_ids, positions: int64 [T], in the order of the layout that `plan` was made from; read_at: int64 [R], indices into
        them; read_plan: made from `layout.only(read_at)`, or `plan` itself where every token is read in its turn. Of the last
        layer only keys and values are computed for tokens that are not read. Returns [R, d] in the decoder's dtype.
        """
        spec = self.spec
        heads = spec.num_heads
        x = self.weights.embedding.rows(token_ids)
        cos, sin = self._rotary.at(positions)
        for i, layer in enumerate(self.weights.layers[:-1]):
            qk, v = self._by_rows(partial(self._heads, 0, layer.heads[0]), layer, x, cos, sin)
            attended = backend.run(qk[:, :heads], qk[:, heads:], v, cache, i, plan, spec.windows[i])
            (x,) = self._by_rows(self._mix, layer, x, attended.flatten(1))
        last = self.weights.layers[-1]
        queries, keys_values = last.heads
        k, v = self._by_rows(partial(self._heads, heads, keys_values), last, x, cos, sin)
        x, cos, sin = (rows.index_select(0, read_at) for rows in (x, cos, sin))
        q, _ = self._by_rows(partial(self._heads, 0, queries), last, x, cos, sin)
        attended = backend.run(q, k, v, cache, spec.num_layers - 1, read_plan, spec.windows[-1])
        (x,) = self._by_rows(self._mix, last, x, attended.flatten(1))
        (hidden,) = self._by_rows(self._final, self.weights.norm, x)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, d] -> float32 [R, V]. Only for checkpoints with an lm_head."""
        assert self.weights.lm_head is not None, f"{self.spec.architecture} has no vocabulary head"
        (logits,) = self._by_rows(lambda linear, x: (linear(x, torch.float32),), self.weights.lm_head, hidden)
        return logits

    def _by_rows(self, work: Callable[..., tuple[Tensor, ...]], weights: Any, *rows: Tensor) -> tuple[Tensor, ...]:
        return in_tiles(work, weights, *rows) if self._tiled else work(weights, *rows)

    def _heads(self, first: int, linear: Linear, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, d]; cos, sin [T, D/2] -> the heads from `first` on that `linear` makes, [T, heads, D]: those that turn with their
        position, and the rest.

        The heads of a layer are H of queries, K of keys, both rotated to their positions, and K of values.
        """
        spec = self.spec
        count = linear.shape[0] // spec.head_dim
        heads = linear(self._norm(x, layer.attention_norm)).view(len(x), count, spec.head_dim)
        num_turned = min(first + count, spec.num_heads + spec.num_kv_heads) - first
        turned, still = heads[:, :num_turned], heads[:, num_turned:]
        if layer.qk_norm is not None:
            turned = self._norm(turned, layer.qk_norm[first : first + num_turned])
        return self._ops.rotate(turned, cos, sin), still

    def _mix(self, layer: LayerWeights, x: Tensor, attended: Tensor) -> tuple[Tensor]:
        """x [T, d], attended [T, H D] -> the layer's output [T, d]."""
        x = layer.out.added_to(x, attended)
        inner = self._ops.swiglu(layer.gate_up(self._norm(x, layer.mlp_norm)))
        return (layer.down.added_to(x, inner),)

    def _final(self, weight: Tensor, x: Tensor) -> tuple[Tensor]:
        return (self._norm(x, weight),)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._ops.norm(x, weight, self.spec.rms_norm_eps)


class _RotaryTables:
    """cos and sin by position, float32 [positions, D/2], in blocks of one shape: an entry's bits depend on its position only."""

    def __init__(self, spec: DecoderSpec, device: torch.device) -> None:
        self._frequencies = rotary_frequencies(spec).to(device)
        self._cos = self._sin = torch.empty(0, spec.head_dim // 2, device=device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos, sin [T, D/2]."""
        need = int(positions.max()) + 1 if len(positions) else 0
        while len(self._cos) < need:
            start = len(self._cos)
            block = torch.arange(start, start + ROTARY_BLOCK, device=self._cos.device, dtype=torch.float32)
            angles = block[:, None] * self._frequencies
            self._cos, self._sin = torch.cat((self._cos, angles.cos())), torch.cat((self._sin, angles.sin()))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def rotary_frequencies(spec: DecoderSpec) -> Tensor:
    """Radians per position of each pair of a head's dimensions: theta^(-2i/D), stretched where the spec says so. float32 [D/2]."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    if spec.rope_scaling is None:
        return frequencies
    s = spec.rope_scaling
    wavelengths = 2 * math.pi / frequencies
    keep = ((s.original_max / wavelengths - s.low) / (s.high - s.low)).clamp(0, 1)  # 0: stretched, 1: as it was
    return (1 - keep) * frequencies / s.factor + keep * frequencies


def in_tiles(work: Callable[..., tuple[Tensor, ...]], weights: Any, *rows: Tensor) -> tuple[Tensor, ...]:
    """`work(weights, *rows)` on tiles of ROW_TILE rows, the last padded with zeros: a row's bits depend on that row alone.

    rows: tensors [T, ...] of one T; `work` returns tensors [rows of a tile, ...] and treats every row alike.
    """
    count = len(rows[0])
    if not count:
        return work(weights, *rows)
    tiles = [work(weights, *(_tile(r, start) for r in rows)) for start in range(0, count, ROW_TILE)]
    return tuple(torch.cat(column)[:count] for column in zip(*tiles, strict=True))


def _tile(rows: Tensor, start: int) -> Tensor:
    """A fresh buffer even for a full tile: a matrix product's bits may hang on its operands' alignment."""
    part = rows[start : start + ROW_TILE]
    tile = rows.new_zeros(ROW_TILE, *rows.shape[1:])
    tile[: len(part)] = part
    return tile
