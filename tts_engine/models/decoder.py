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
        self.spec, self.weights, self.deterministic = spec, weights, deterministic
        self._tiled = deterministic and not all(linear.by_row for linear in weights.linears)
        self._ops = ops_for(self.device)
        self._frequencies = rotary_frequencies(spec).to(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.norm.device

    def rows_beside(self, count: int) -> int:
        """Rows of zeros that go through the matrices beside so many."""
        return -count % ROW_TILE if self._tiled else 0

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, *, cache: KVCache, backend: AttentionBackend, plan: Any,
                read_at: Tensor, read_plan: Any) -> Tensor:  # fmt: skip
        """Run T new tokens, store their keys and values, and return the final-normed hidden states at R of them.

        token_ids, positions: int64 [T], in the order of the layout that `plan` was made from; read_at: int64 [R], indices into
        them; read_plan: made from `layout.only(read_at)`, or `plan` itself where every token is read in its turn. Of the last
        layer only keys and values are computed for tokens that are not read. Returns [R, d] in the decoder's dtype.

        On a GPU nothing of it waits for the device, and it hangs on the tensors' shapes alone: it can be captured.
        """
        spec, ops, epsilon = self.spec, self._ops, self.spec.rms_norm_eps
        x = self.weights.embedding.rows(token_ids)
        angles = partial(in_tiles, self._angles) if self.deterministic else self._angles  # an element's bits may hang on its place
        cos, sin = angles(self._frequencies, positions)
        for i, layer in enumerate(self.weights.layers[:-1]):
            (heads,) = self._by_rows(self._heads, (layer, layer.heads[0]), x)
            new = ops.enter(heads, layer.qk_norm, epsilon, cos, sin, cache, i, plan.write_slots)
            attended = backend.run(*new, cache, i, plan, spec.windows[i])
            (x,) = self._by_rows(self._mix, layer, x, attended.flatten(1))
        last, i = self.weights.layers[-1], spec.num_layers - 1
        queries, keys_values = last.heads
        of_queries, of_keys = (None, None) if last.qk_norm is None else last.qk_norm.tensor_split((spec.num_heads,))
        (heads,) = self._by_rows(self._heads, (last, keys_values), x)
        _, k, v = ops.enter(heads, of_keys, epsilon, cos, sin, cache, i, plan.write_slots)
        x, cos, sin = (rows.index_select(0, read_at) for rows in (x, cos, sin))
        (heads,) = self._by_rows(self._heads, (last, queries), x)
        q = ops.turn(heads, of_queries, epsilon, cos, sin)
        attended = backend.run(q, k, v, cache, i, read_plan, spec.windows[-1])
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

    def _angles(self, frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos, sin float32 [T, D/2]."""
        angles = positions[:, None].float() * frequencies
        return angles.cos(), angles.sin()

    def _heads(self, part: tuple[LayerWeights, Linear], x: Tensor) -> tuple[Tensor]:
        """x [T, d] -> the heads that a layer's matrix makes of it, [T, heads, D]."""
        layer, linear = part
        dim = self.spec.head_dim
        return (linear(self._norm(x, layer.attention_norm)).view(len(x), linear.shape[0] // dim, dim),)

    def _mix(self, layer: LayerWeights, x: Tensor, attended: Tensor) -> tuple[Tensor]:
        """x [T, d], attended [T, H D] -> the layer's output [T, d]."""
        x = layer.out.added_to(x, attended)
        inner = self._ops.swiglu(layer.gate_up(self._norm(x, layer.mlp_norm)))
        return (layer.down.added_to(x, inner),)

    def _final(self, weight: Tensor, x: Tensor) -> tuple[Tensor]:
        return (self._norm(x, weight),)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._ops.norm(x, weight, self.spec.rms_norm_eps)


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
