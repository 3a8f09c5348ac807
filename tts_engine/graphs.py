"""Captured decode: ticks of the same rows on end, without the host.

A tick, from the embedding of each row's newest token to where the row goes next, is a graph of kernels over buffers that stay where
they are. It is captured once for each size in BUCKETS and kind of sampling, and replayed over any tree. Where there are no graphs,
as on a CPU, the same tick is called instead. Knows tensors and columns of numbers; whose rows they are is the policy's business.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention.base import BatchLayout
from .attention.triton_tree import RESERVE, Cut, TableBuffers, TritonTreeAttention
from .kv.cache import KVCache
from .models.decoder import Decoder
from .models.linear import Plain

TICKS = 8  # on end, at most
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, *range(256, 1024, 64), *range(1024, 4097, 256))
WIDE_ROWS = 64  # the tile class that a graph's kernel has, beside that for narrow items: whatever the tree, it is the same kernel
ITEMS, MOST_ITEMS = 8, 1024  # for each row at least; in all where rows are few and their paths are cut into many
FUSED_ROWS = 256  # up to which the vocabulary's product waits for memory: draws are made within it, and logits are not written
SEGMENTS = 64  # for each row: steps above it that others share
RESULTS = ("state", "stop", "drawn", "tokens")  # columns that come back


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What B rows stand at before the first tick, as columns."""

    token: np.ndarray  # int64 [B], the newest of each, not written yet
    position: np.ndarray  # int64 [B], where it stands on its path
    slots: np.ndarray  # int64 [ticks + 1, B], leased to the row: for that token and those behind it
    state: np.ndarray  # int32 [B], the step rule's
    room: np.ndarray  # int32 [B], tokens that may still be drawn, 1 at least
    key: np.ndarray  # uint32 [B, 2]
    identity: np.ndarray  # uint64 [B]
    temperature: np.ndarray  # float32 [B]
    top_k: np.ndarray  # int32 [B]
    top_p: np.ndarray  # float32 [B]
    min_p: np.ndarray  # float32 [B]

    @property
    def restricted(self) -> bool:
        return bool((self.top_k > 0).any() or (self.top_p < 1).any() or (self.min_p > 0).any())


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What came of them."""

    tokens: np.ndarray  # int32 [ticks, B], of which a row has the first `drawn`
    drawn: np.ndarray  # int32 [B]
    state: np.ndarray  # int32 [B]
    stop: np.ndarray  # int32 [B], why a row stopped, see kernels/advance.py; 0 where it goes on


@dataclass(frozen=True, slots=True)
class Outlook:
    """A tree as its rows will read it, and for how many ticks they can; 0 where no graph serves it."""

    tree: Any  # _C.TreePlan
    ticks: int


class DecodeGraphs:
    """The captured ticks of one model: `plan`, `start`, and `finish` before the next start."""

    def __init__(self, decoder: Decoder, cache: KVCache, attention: TritonTreeAttention, *, after: np.ndarray | None,
                 ends: np.ndarray, last_state: int) -> None:  # fmt: skip
        """after uint8 [states, V], ends bool [V], last_state: the step rule's, as kernels/advance.py takes them."""
        from tts_kernels.advance import advance
        from tts_kernels.lm_head_sample import DEPTH, lm_head_sample
        from tts_kernels.sample import sample

        self._sample, self._lm_head_sample, self._advance = sample, lm_head_sample, advance
        head = decoder.weights.lm_head
        fuses = isinstance(head, Plain) and head.bias is None and head.shape[1] % DEPTH == 0 and not decoder.deterministic
        self._lm_head = head.weight if fuses else None  # type: ignore[union-attr]
        self._decoder, self._cache, self._attention = decoder, cache, attention
        self._device = decoder.device
        self._after = None if after is None else torch.from_numpy(after).to(self._device)
        self._ends, self._last_state = torch.from_numpy(ends.astype(np.uint8)).to(self._device), last_state
        self._under_way: tuple[_Bucket, int, int] | None = None  # with how many ticks and rows
        self._captures = self._device.type == "cuda"
        if self._captures:
            self._stream, self._done = torch.cuda.Stream(self._device), torch.cuda.Event()
        self._forget()

    def plan(self, layout: BatchLayout) -> Outlook:
        """For rows of one token each; `layout` is that of the first tick."""
        if self._version != self._cache.version:  # its tensors are others
            self._forget()
        spec, size = self._decoder.spec, bucket_for(len(layout.rows))
        cut = self._attention.cut(layout, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        tree = self._attention.tree(layout, cut)
        if size is None:
            return Outlook(tree, 0)
        if size not in self._buckets:
            self._buckets[size] = _Bucket(size, self._cache, self._attention, cut, spec.max_positions)
        fits = self._buckets[size].fits(tree)
        return Outlook(tree, min(TICKS, tree.growth + 1) if fits else 0)

    def start(self, outlook: Outlook, draws: Draws) -> None:
        """Begin as many ticks as `draws` has slots for but one, at most as many as the outlook has; nothing is waited for."""
        assert self._under_way is None, "what was started must be finished first"
        ticks, num_rows = len(draws.slots) - 1, len(draws.token)
        assert 1 <= ticks <= outlook.ticks
        if ticks > 1 and not outlook.tree.reserve(np.ascontiguousarray(draws.slots[1:ticks])):
            raise AssertionError("a tree grows less than it said")
        bucket = self._buckets[bucket_for(num_rows)]  # type: ignore[index]
        bucket.load(draws, outlook.tree)
        kind = bucket.size, draws.restricted
        if kind not in self._graphs:
            self._graphs[kind] = self._made(bucket, draws.restricted)
            bucket.load(draws, outlook.tree)  # a tick has been tried
        for _ in range(ticks):
            self._graphs[kind]()
        bucket.columns.download()
        if self._captures:
            self._done.record()
        self._under_way = bucket, ticks, num_rows

    def finish(self) -> Drawn:
        """Wait for what was started."""
        assert self._under_way is not None, "nothing was started"
        if self._captures:
            self._done.synchronize()
        (bucket, ticks, num_rows), self._under_way = self._under_way, None
        host = bucket.columns.host
        return Drawn(tokens=host["tokens"][:ticks, :num_rows].copy(),
                     **{name: host[name][:num_rows].copy() for name in RESULTS[:-1]})  # fmt: skip

    def abandon(self) -> None:
        """Wait for whatever was started, which is nobody's any more."""
        if self._captures:
            torch.cuda.synchronize(self._device)
        self._under_way = None

    def _forget(self) -> None:
        """What was captured, if anything."""
        self._buckets: dict[int, _Bucket] = {}
        self._graphs: dict[tuple[int, bool], Callable[[], None]] = {}
        self._version = self._cache.version
        if self._captures:  # one pool for all graphs, of which no two run at a time; one that no graph uses is not taken up again
            self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def _tick(self, bucket: "_Bucket", restricted: bool) -> None:
        rows, given = bucket.rows, bucket.columns.device
        attention: Any = bucket
        hidden = self._decoder.forward(rows.token, rows.position, cache=self._cache, backend=attention, plan=attention,
                                       read_at=bucket.every, read_plan=attention)  # fmt: skip
        who = (bucket.every, given["key"], given["identity"], rows.next_position, given["temperature"])
        if self._lm_head is not None and not restricted and bucket.size <= FUSED_ROWS:
            new = self._lm_head_sample(hidden, self._lm_head, *who)
        else:
            limits = [given[name] for name in ("top_k", "top_p", "min_p")] if restricted else []
            new = self._sample(self._decoder.logits(hidden), *who, *limits)
        self._advance(rows, new, self._after, self._ends, last_state=self._last_state)

    def _made(self, bucket: "_Bucket", restricted: bool) -> Callable[[], None]:
        """What does a tick over the bucket's buffers: on a GPU, after one tick on them, the replay of a graph of it."""
        tick = partial(self._tick, bucket, restricted)
        if not self._captures:
            return tick
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            tick()  # kernels are compiled, and libraries take the memory that they work in
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            tick()
        return graph.replay


class _Bucket:
    """The buffers of one size of batch; and attention over them, backend and plan in one."""

    def __init__(self, size: int, cache: KVCache, attention: TritonTreeAttention, cut: Cut, max_positions: int) -> None:
        from tts_kernels.advance import NOBODY, Rows

        self.size, self._nobody, self._attention, device = size, NOBODY, attention, cache.k[0].device
        self._cut = replace(cut, rows=max(cut.rows, WIDE_ROWS))
        items = max(ITEMS * size, min(MOST_ITEMS, 64 * size))
        self._buffers = TableBuffers(device, {
            "counts": 2, "grown": size, "order": size, "items": items, "merges": size, "merge_slots": items, "partials": items,
            "segments": items + SEGMENTS * size, "slots": min(cache.num_slots, size * max_positions) + RESERVE * size,
        })  # fmt: skip
        one, ahead = (size,), (TICKS + 1, size)
        self.columns = _Columns({
            "slots": (np.int64, ahead), "token": (np.int64, one), "position": (np.int64, one), "next_position": (np.int64, one),
            "slot": (np.int64, one), "identity": (np.int64, one), "key": (np.int32, (size, 2)), "temperature": (np.float32, one),
            "top_k": (np.int32, one), "top_p": (np.float32, one), "min_p": (np.float32, one), "room": (np.int32, one),
            "state": (np.int32, one), "stop": (np.int32, one), "drawn": (np.int32, one), "tokens": (np.int32, (TICKS, size)),
        }, device)  # fmt: skip
        given = self.columns.device | {"grown": self._buffers.tables.grown}
        self.rows = Rows(**{field.name: given[field.name] for field in fields(Rows)})
        self.every = torch.arange(size, device=device)
        self.fits = self._buffers.fits

    @property
    def write_slots(self) -> Tensor:
        return self.rows.slot

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, layer: int, plan: "_Bucket",
            window: int | None = None) -> Tensor:  # fmt: skip
        assert window is None
        if k is not None and v is not None:
            cache.write(layer, self.rows.slot, k, v)
        return self._attention.attend(q, cache, layer, self._buffers.tables, self._cut)

    def load(self, draws: Draws, tree: Any) -> None:
        """Put rows where they start. Those beyond stand still, whatever they hold, at a slot of the first row's, unread."""
        host, ticks, count = self.columns.host, len(draws.slots) - 1, len(draws.token)
        for field in fields(Draws):
            if field.name != "slots":
                host[field.name][:count] = getattr(draws, field.name)  # of unsigned numbers the bits
        host["next_position"][:count] = draws.position + 1
        host["slots"][:] = draws.slots[-1, 0]
        host["slots"][: ticks + 1, :count] = draws.slots
        host["slots"][ticks + 1 :, :count] = draws.slots[-1]
        host["slot"][:] = host["slots"][0]
        host["stop"][:] = self._nobody
        host["stop"][:count] = host["drawn"][:count] = 0
        self.columns.upload()
        self._buffers.load(tree)


class _Columns:
    """Named columns of any type in one buffer on the host and one on the device, so that they travel together."""

    def __init__(self, columns: dict[str, tuple[type, tuple[int, ...]]], device: torch.device) -> None:
        sizes = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in columns.values()]
        starts = np.cumsum([0, *(-(-size // 16) * 16 for size in sizes)]).tolist()
        self._host = torch.zeros(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
        self._results = starts[list(columns).index(RESULTS[0])]
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        for (name, (dtype, shape)), start, size in zip(columns.items(), starts, sizes, strict=False):
            self.host[name] = self._host.numpy()[start : start + size].view(dtype).reshape(shape)
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            self.device[name] = self._device[start : start + size].view(kind).view(shape)

    def upload(self) -> None:
        self._device.copy_(self._host, non_blocking=True)

    def download(self) -> None:
        """Of RESULTS, the last columns."""
        self._host[self._results :].copy_(self._device[self._results :], non_blocking=True)


def bucket_for(num_rows: int) -> int | None:
    """The size of the smallest batch captured that holds so many rows; None where none does."""
    return next((size for size in BUCKETS if size >= num_rows), None)
