"""The end of a decoding tick: every row takes the token that was drawn for it, and finds out whether it goes on and where to.

What a row stands at lives on the device, so that many ticks follow one another without the host. A row that has stopped stays what
it is, and writes its keys and values where nobody reads them.
"""

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability

ROWS = 128  # of one program

# Why a row has stopped; 0 while it goes on. One token may do several.
ENDED, CLOSED, CUT, FAULT, NOBODY = 1, 2, 4, 8, 16
# NOBODY: padding, stopped from the start. FAULT: what was drawn is no token, see kernels/sample.py.

STOPPED = -(1 << 30)  # what a row has grown by once it stopped: fewer tokens than any step has


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What B rows stand at between two ticks, K of which follow one another; contiguous, changed in place."""

    token: Tensor  # int64 [B], read by the next tick
    position: Tensor  # int64 [B], where it stands on its path
    next_position: Tensor  # int64 [B], where the token behind it will stand
    slot: Tensor  # int64 [B], where its keys and values go
    slots: Tensor  # int64 [K + 1, B], those of the ticks to come, and one that is a row's own and read in none of them
    state: Tensor  # int32 [B], the step rule's
    room: Tensor  # int32 [B], tokens that may still be drawn
    grown: Tensor  # int32 [B], ticks since the first; STOPPED and less once the row has
    drawn: Tensor  # int32 [B], its tokens so far
    stop: Tensor  # int32 [B], why it stopped
    tokens: Tensor  # int32 [K, B], the first `drawn` of each column


@triton.jit(do_not_specialize=["num_rows"])
def _advance(new, after, ends, token, position, next_position, slot, slots, state, room, grown, drawn, stop, tokens, num_rows,
             VOCAB: tl.constexpr, TICKS: tl.constexpr, LAST_STATE: tl.constexpr, COUNTS: tl.constexpr, ROWS: tl.constexpr,
             ENDED: tl.constexpr, CLOSED: tl.constexpr, CUT: tl.constexpr, FAULT: tl.constexpr,
             STOPPED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < num_rows) & (tl.load(stop + row, mask=row < num_rows, other=1) == 0)
    given = tl.load(new + row, mask=live, other=0)
    taken = tl.maximum(given, 0)
    before = tl.load(drawn + row, mask=live, other=0)
    tl.store(tokens + before.to(tl.int64) * num_rows + row, given.to(tl.int32), mask=live)
    at = tl.load(state + row, mask=live, other=0)
    if COUNTS:
        at = tl.maximum(at - 1, LAST_STATE)
    else:
        at = tl.load(after + at.to(tl.int64) * VOCAB + taken, mask=live, other=0).to(tl.int32)
    left = tl.load(room + row, mask=live, other=0) - 1
    why = (tl.load(ends + taken, mask=live, other=0) != 0).to(tl.int32) * ENDED
    why += (at == LAST_STATE).to(tl.int32) * CLOSED + (left <= 0).to(tl.int32) * CUT
    why += (given < 0).to(tl.int32) * FAULT
    goes_on = why == 0
    place = tl.load(next_position + row, mask=live, other=0)
    to = tl.where(goes_on, before + 1, TICKS).to(tl.int64)
    tl.store(slot + row, tl.load(slots + to * num_rows + row, mask=live, other=0), mask=live)
    tl.store(token + row, taken, mask=live & goes_on)
    tl.store(position + row, place, mask=live & goes_on)
    tl.store(next_position + row, place + 1, mask=live & goes_on)
    tl.store(grown + row, tl.where(goes_on, tl.load(grown + row, mask=live, other=0) + 1, STOPPED), mask=live)
    tl.store(state + row, at, mask=live)
    tl.store(room + row, left, mask=live)
    tl.store(drawn + row, before + 1, mask=live)
    tl.store(stop + row, why, mask=live)


def prepare(rows: Rows, new: Tensor, after: Tensor | None, ends: Tensor, *, last_state: int,
            capability: int) -> Launch:  # fmt: skip
    return Launch(
        kernel=_advance,
        grid=(triton.cdiv(len(new), ROWS),),
        arguments=dict(new=new, after=ends if after is None else after, ends=ends,
                       **{field.name: getattr(rows, field.name) for field in fields(rows)}, num_rows=len(new), VOCAB=len(ends),
                       TICKS=len(rows.tokens), LAST_STATE=last_state, COUNTS=after is None, ROWS=ROWS, ENDED=ENDED, CLOSED=CLOSED,
                       CUT=CUT, FAULT=FAULT, STOPPED=STOPPED),
        capability=capability,
    )  # fmt: skip


def advance(rows: Rows, new: Tensor, after: Tensor | None, ends: Tensor, *, last_state: int) -> None:
    """Give rows that go on their tokens new int64 [B]; the others change in nothing.

    after uint8 [states, V]: the step rule's state behind one more token; None where a state counts the tokens down that are left.
    The step is whole at `last_state`. ends uint8 [V]: not 0 for tokens that end the whole text.
    """
    columns = [getattr(rows, field.name) for field in fields(rows)]
    assert all(column.is_contiguous() and column.shape[-1] == len(new) for column in columns)
    assert new.dtype == torch.int64 and new.is_contiguous()
    assert len(rows.slots) == len(rows.tokens) + 1 and (after is None or after.shape[1] == len(ends))
    prepare(rows, new, after, ends, last_state=last_state, capability=capability(new.device)).run()
