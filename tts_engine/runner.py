"""One model with its own KV tree and cache: runs of new tokens in, hidden states out.

Policy and PRM are two of these. Knows handles, tokens and tensors; nothing of branches, text or search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .attention.base import AttentionBackend, BatchLayout
from .errors import EngineError
from .kv.cache import KVCache
from .kv.tree import NO_NODE, KVTree, TreePaths, blocks_needed
from .ledger import ModelLedger, Work
from .models.decoder import Decoder

NO_MEMORY = ("out of memory", "not enough memory", "allocate memory")  # what torch says where an allocation failed


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that the device's memory did not suffice: by its words, a CPU's allocator has no error of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of consecutive new tokens, each of one node or lease; B of them, T tokens in all."""

    handles: np.ndarray  # int64 [B]
    is_lease: np.ndarray  # bool [B]
    starts: np.ndarray  # int32 [B], own tokens of the node or lease that are written already
    counts: np.ndarray  # int32 [B], new tokens
    path_starts: np.ndarray  # int32 [B], tokens on the path before the node or lease
    token_ids: np.ndarray  # int64 [T]

    @property
    def context_lens(self) -> np.ndarray:
        """Tokens that the last token of each run sees, itself among them. int32 [B]."""
        return self.path_starts + self.starts + self.counts


class ModelRunner:
    """A decoder, its KV tree and its cache under one budget of blocks."""

    def __init__(self, decoder: Decoder, backend: AttentionBackend, *, num_blocks: int, block_size: int) -> None:
        """Raises EngineError for a pool that cannot be had."""
        spec = decoder.spec
        self.decoder, self.backend = decoder, backend
        self.forwards = 0
        self._evictions_charged = 0
        self.tokens_recomputed = 0  # whose keys and values had been there before
        self.blocks_read = 0  # of all forwards, each time those that somebody stands on
        self._read_flops = spec.flops_per_read
        self._token_flops = spec.flops_per_token - spec.flops_per_read
        self._num_layers, self._pair_flops = spec.num_layers, spec.attention_flops_per_pair // spec.num_layers
        try:
            self.tree = KVTree(num_blocks=num_blocks, block_size=block_size)
            self.cache = KVCache(num_layers=spec.num_layers, num_blocks=num_blocks, block_size=block_size,
                                 num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, dtype=decoder.dtype,
                                 device=decoder.device)  # fmt: skip
        except (ValueError, TypeError, RuntimeError, MemoryError) as error:
            raise EngineError(f"{num_blocks} KV blocks of {block_size} tokens cannot be held on {decoder.device}: lower "
                              f"kv_bytes") from error  # fmt: skip

    @cached_property
    def stream(self) -> torch.cuda.Stream | None:
        """On a GPU one of its own, for forwards that run beside another model's. Whatever else is done with this model's tensors is
        done before they begin: its weights are there, and `resize` waits."""
        device = self.decoder.device
        if device.type != "cuda":
            return None
        torch.cuda.synchronize(device)
        return torch.cuda.Stream(device)

    @property
    def block_bytes(self) -> int:
        return self.cache.block_bytes

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values."""
        return self.block_bytes // self.tree.block_size

    def resize(self, num_blocks: int) -> bool:
        """So many blocks from here on, with all that is computed but what idle nodes must give up; between forwards. False, with no
        block more or less, where what is filling or pinned does not fit or the memory cannot be had."""
        before = self.tree.num_blocks
        moves = self.tree.resize(num_blocks) if num_blocks < before else np.empty((0, 2), np.int32)
        if moves is None:
            return False
        try:
            self.cache.copy(moves)
            self.cache.resize(num_blocks, self.tree.extent)
        except BaseException as error:
            self.cache.copy(moves)  # an interrupt may have come before all were; copied twice is copied
            self.tree.resize(before)
            if not isinstance(error, RuntimeError | MemoryError):
                raise
            return False
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        self.tree.resize(num_blocks)
        return True

    def start_over(self) -> None:
        """A tree with nothing in it, for where an interrupt came between two lines and left what nobody knows of any more."""
        self.tree = KVTree(num_blocks=self.tree.num_blocks, block_size=self.tree.block_size)
        self.cache.version += 1
        self._evictions_charged = 0

    def hold_path(self, steps: Sequence[Sequence[int]]) -> list[int] | None:
        """The nodes of a path given as token ids step by step, made where they are missing; the last one is held.

        None where the blocks cannot be had now; then nothing is held.
        """
        parent, nodes = NO_NODE, list[int]()
        for tokens in steps:
            node = self.tree.insert(parent, tokens)
            if nodes:
                self.tree.drop(nodes[-1])  # pinned by its child from here on, or no longer needed
            if node == NO_NODE:
                return None
            nodes.append(node)
            parent = node
        return nodes

    def layout(self, segments: Segments) -> BatchLayout:
        """Where all of it stands."""
        s = segments
        places = self.tree.lay_out(s.handles, s.is_lease, s.starts, s.counts, s.path_starts)
        return BatchLayout(
            rows=s.handles,
            starts=s.starts,
            ends=places.ends,
            row_starts=places.row_starts,
            positions=places.positions,
            write_slots=places.write_slots,
            context_lens=places.context_lens,
            paths=TreePaths(self.tree, s.handles, s.is_lease, places.ends, places.context_lens),
            version=self.cache.version,
        )

    def forward(self, segments: Segments, read_at: np.ndarray) -> Tensor:
        """Write the new tokens' K and V; hidden states [R, d] at read_at int64 [R], increasing indices into the T tokens, one of a
        run at most, or all of them.

        A run's ancestors must be written already or be runs of this forward. Marking nodes as computed is the caller's.
        """
        self.count_forwards(1)
        layout = self.layout(segments)
        device = self.decoder.device
        given = (segments.token_ids, layout.positions, read_at)
        ids, positions, reads = (torch.from_numpy(x).to(device) for x in given)
        plan = self.backend.plan(layout)
        read_plan = plan if len(read_at) == len(layout.positions) else self.backend.plan(layout.only(read_at))
        return self.decoder.forward(
            ids, positions, cache=self.cache, backend=self.backend, plan=plan, read_at=reads, read_plan=read_plan
        )

    def count_forwards(self, times: int) -> None:
        """Note forwards of those who hold or lease now."""
        self.forwards += times
        self.blocks_read += times * self.tree.needed

    def charge(self, ledger: ModelLedger, work: Work, head_flops: int) -> None:
        """Count work into a ledger; head_flops: of the head, for one hidden state that is read."""
        linear, attention = self._layer_flops(work)
        ledger.tokens_computed += work.tokens
        ledger.blocks_evicted += self.tree.evicted - self._evictions_charged
        self._evictions_charged = self.tree.evicted
        ledger.linear_flops += linear
        ledger.attention_flops += attention
        ledger.head_flops += head_flops * work.reads

    def flops(self, work: Work, head_flops: int) -> int:
        """All that the work comes to."""
        return sum(self._layer_flops(work)) + head_flops * work.reads

    def padding(self, tokens: int, reads: int, head_flops: int) -> int:
        """FLOPs of the rows that a forward of so many tokens computes beside them, through matrices only; head_flops: as above."""
        beside, beside_reads = self.decoder.rows_beside(tokens), self.decoder.rows_beside(reads)
        return self._token_flops * beside + (self._read_flops + head_flops) * beside_reads

    def _layer_flops(self, work: Work) -> tuple[int, int]:
        """Of matrices and of attention."""
        linear = self._token_flops * work.tokens + self._read_flops * work.reads
        return linear, self._pair_flops * ((self._num_layers - 1) * work.pairs + work.read_pairs)

    def blocks_for_branch(self, prompt_tokens: int, max_tokens: int, max_steps: int) -> int:
        """What one branch at full length may need: at most `max_tokens` tokens in at most `max_steps` steps, which take most blocks
        where all of them but one are a single token."""
        size = self.tree.block_size
        steps = min(max_steps, max_tokens)
        return blocks_needed(prompt_tokens, size) + steps - 1 + blocks_needed(max_tokens - steps + 1, size)
