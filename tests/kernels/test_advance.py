"""What a tick leaves behind, against the same written down row by row."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from tts_kernels import advance as kernel
from tts_kernels.advance import CLOSED, CUT, ENDED, FAULT, NOBODY, STOPPED, Rows

VOCAB, LAST = 11, 2


def some_rows(count: int, ticks: int, gen: np.random.Generator, states: int) -> Rows:
    """Rows at the beginning of their ticks, a few of them nobody's."""
    nobody = gen.random(count) < 0.2
    position = gen.integers(0, 1000, count)
    slots = gen.permutation((ticks + 1) * count).reshape(ticks + 1, count)
    columns = {
        "token": gen.integers(0, VOCAB, count),
        "position": position,
        "next_position": position + 1,
        "slot": slots[0],
        "slots": slots,
        "state": np.where(gen.random(count) < 0.5, 0, gen.integers(LAST + 1, states, count)).astype(np.int32),
        "room": gen.integers(1, 2 * ticks, count).astype(np.int32),
        "grown": np.where(nobody, STOPPED, 0).astype(np.int32),
        "drawn": np.zeros(count, np.int32),
        "stop": np.where(nobody, NOBODY, 0).astype(np.int32),
        "tokens": np.full((ticks, count), -1, np.int32),
    }
    return Rows(**{name: torch.from_numpy(column.copy()) for name, column in columns.items()})


def advanced(rows: Rows, new, after, ends) -> Rows:
    """The definition."""
    row = {field.name: getattr(rows, field.name).numpy().copy() for field in fields(rows)}
    for b in range(len(new)):
        if row["stop"][b]:
            continue
        row["tokens"][row["drawn"][b], b] = new[b]
        row["drawn"][b] += 1
        row["room"][b] -= 1
        token = max(new[b], 0)
        row["state"][b] = max(row["state"][b] - 1, LAST) if after is None else after[row["state"][b], token]
        reasons = {ENDED: ends[token], CLOSED: row["state"][b] == LAST, CUT: row["room"][b] <= 0, FAULT: new[b] < 0}
        row["stop"][b] = sum(reason for reason, holds in reasons.items() if holds)
        if row["stop"][b]:
            row["slot"][b], row["grown"][b] = row["slots"][-1, b], STOPPED
        else:
            row["slot"][b], row["token"][b] = row["slots"][row["drawn"][b], b], new[b]
            row["position"][b] += 1
            row["next_position"][b] += 1
            row["grown"][b] += 1
    return Rows(**{name: torch.from_numpy(column) for name, column in row.items()})


@pytest.mark.parametrize("count", [1, 16, 200])
@pytest.mark.parametrize("counts", [False, True], ids=["marked", "drawn lengths"])
def test_rows_take_their_tokens_go_on_and_stop_as_the_definition_says(count, counts):
    gen, ticks = np.random.default_rng(count), 5
    rows = some_rows(count, ticks, gen, states=6)
    after = None if counts else gen.integers(0, 6, (6, VOCAB)).astype(np.uint8)
    ends = (np.arange(VOCAB) == 3).astype(np.uint8)
    seen = set()
    for _ in range(ticks):
        new = np.where(gen.random(count) < 0.03, -1, gen.integers(0, VOCAB, count))
        expected = advanced(rows, new, after, ends)
        kernel.advance(rows, torch.from_numpy(new), None if after is None else torch.from_numpy(after),
                       torch.from_numpy(ends), last_state=LAST)  # fmt: skip
        for field in fields(Rows):
            assert torch.equal(getattr(rows, field.name), getattr(expected, field.name)), field.name
        seen |= set(rows.stop.tolist())
    if count == 200:
        assert all(any(stop & reason for stop in seen) for reason in (ENDED, CLOSED, CUT, FAULT, NOBODY)) and 0 in seen


def test_a_row_that_goes_all_the_way_ends_at_its_last_slot_and_one_that_stops_waits_there():
    """So neither writes, in ticks to come, where something is read."""
    slots = torch.arange(8).reshape(4, 2)
    columns = {name: torch.zeros(2, dtype=torch.int32) for name in ("state", "grown", "drawn", "stop")}
    rows = Rows(token=torch.tensor([0, 0]), position=torch.tensor([7, 7]), next_position=torch.tensor([8, 8]), slots=slots,
                slot=slots[0].clone(), room=torch.tensor([9, 2], dtype=torch.int32),
                tokens=torch.zeros(3, 2, dtype=torch.int32), **columns)  # fmt: skip
    ends, after, written = torch.zeros(VOCAB, dtype=torch.uint8), torch.zeros(1, VOCAB, dtype=torch.uint8), []
    for _ in range(3):
        written.append(rows.slot.tolist())
        kernel.advance(rows, torch.tensor([5, 6]), after, ends, last_state=LAST)
    assert written == [[0, 1], [2, 3], [4, 7]] and rows.slot.tolist() == [6, 7]
    assert rows.stop.tolist() == [0, CUT] and rows.drawn.tolist() == [3, 2] and rows.position.tolist() == [10, 8]
