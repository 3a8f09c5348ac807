"""Keys and values of one model: a pool of slots per layer. Knows tensors only; which slot is whose is kv/tree.py's business."""

import torch
from torch import Tensor


class KVCache:
    """`k` and `v` of shape [layers, slots, kv heads, head_dim]; slot = block * block_size + offset."""

    def __init__(self, *, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device | str = "cpu") -> None:  # fmt: skip
        shape = (num_layers, num_blocks * block_size, num_kv_heads, head_dim)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T, K, D] of T new tokens at `slots` [T] (int64) of one layer."""
        self.k[layer].index_copy_(0, slots, k)
        self.v[layer].index_copy_(0, slots, v)
