"""Keys and values of one model: a pool of slots per layer. Knows tensors only; which slot is whose is kv/tree.py's business."""

import numpy as np
import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]


class KVCache:
    """`k` and `v`: for each layer a tensor [slots, kv heads, head_dim]; slot = block * block_size + offset.

    The tensors are others after `resize`: who keeps their addresses goes by `version`.
    """

    def __init__(self, *, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device | str = "cpu") -> None:  # fmt: skip
        shape = (num_blocks * block_size, num_kv_heads, head_dim)
        self.num_blocks, self.block_size, self.num_kv_heads, self.dtype = num_blocks, block_size, num_kv_heads, dtype
        self.block_bytes = 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize  # of all layers
        self.k, self.v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)] for _ in "kv")
        self.version = 0

    @property
    def tables(self) -> list[Tensor]:
        """The keys of every layer, then the values."""
        return self.k + self.v

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T, K, D] of T new tokens at `slots` [T] (int64) of one layer."""
        self.k[layer].index_copy_(0, slots, k)
        self.v[layer].index_copy_(0, slots, v)

    def copy(self, moves: np.ndarray) -> None:
        """Copy whole blocks; moves int32 [M, 2], from one number to another, no number twice."""
        if self.k[0].device.type == "cpu":
            block_bytes = self.k[0][: self.block_size].nbytes
            return _C.copy_blocks([table.data_ptr() for table in self.tables], block_bytes, moves)
        source, target = torch.from_numpy(moves.T.astype(np.int64)).to(self.k[0].device)
        for table in self.tables:
            blocks = table.view(self.num_blocks, -1)
            blocks.index_copy_(0, target, blocks.index_select(0, source))

    def resize(self, num_blocks: int, used: int) -> None:
        """So many blocks from here on; the contents of the first `used` of them stay. There is never more than one tensor too many.

        What torch raises where the memory cannot be had leaves all as it was, as an interrupt does.
        """
        done = []
        self.version += 1
        try:
            for tables in (self.k, self.v):
                for layer, table in enumerate(tables):
                    tables[layer] = self._sized(table, num_blocks, used)
                    done.append((tables, layer))
        except BaseException:
            for tables, layer in done:
                tables[layer] = self._sized(tables[layer], self.num_blocks, used)
            raise
        self.num_blocks = num_blocks

    def _sized(self, table: Tensor, num_blocks: int, used: int) -> Tensor:
        sized = table.new_zeros(num_blocks * self.block_size, *table.shape[1:])
        kept = used * self.block_size
        sized[:kept] = table[:kept]
        return sized
