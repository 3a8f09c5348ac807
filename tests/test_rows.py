"""What a tick does to the rows that decode, against the same written down row by row."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_engine.kv.tree import NO_NODE, KVTree
from tts_engine.rows import CUT, END, WHOLE, Rows, Run
from tts_engine.steps import CLOSED

VOCAB, STATES = 7, 5
A_TREE = KVTree(num_blocks=1, block_size=1)


class Slowly:
    """The definition: a dict a row."""

    def __init__(self):
        self.rows = []

    def follow(self, runs, sources, count):
        decoding = {}
        for row in self.rows[:count]:
            decoding.setdefault(row["lease"], row)
        own = {lease: len(runs) + i for i, lease in enumerate(decoding)}
        runs = [
            *runs,
            *(Run(lease, True, row["length"] - 1, row["path_start"], [row["newest"]]) for lease, row in decoding.items()),
        ]
        ends = np.cumsum([len(run.tokens) for run in runs]) - 1
        drawn_behind = [*(own[row["lease"]] for row in self.rows[:count]), *sources]
        read = sorted(set(drawn_behind))
        columns = {"handles": [run.handle for run in runs], "is_lease": [run.is_lease for run in runs],
                   "starts": [run.start for run in runs], "counts": [len(run.tokens) for run in runs],
                   "path_starts": [run.path_start for run in runs],
                   "token_ids": [token for run in runs for token in run.tokens]}  # fmt: skip
        return columns, [ends[run] for run in read], [read.index(run) for run in drawn_behind]

    def draws(self, sampling, sources):
        mine = [(i, row) for i, row in enumerate(self.rows) if row["sampling"] == sampling]
        return ([i for i, _ in mine], [sources[i] for i, _ in mine], [list(row["key"]) for _, row in mine],
                [row["identity"] for _, row in mine], [row["path_start"] + row["length"] for _, row in mine])  # fmt: skip

    def append(self, tokens, rule):
        """With what left, what comes of each lease that was shared: its rows class by class, the one that keeps it first, and for
        each class whether it needs a lease at all."""
        left, shared = [], {}
        for row, token in zip(self.rows, tokens, strict=True):
            state = max(row["state"] - 1, CLOSED) if rule.after is None else int(rule.after[row["state"], token])
            row |= {"newest": token, "length": row["length"] + 1, "state": state}
            why = END * bool(rule.eos[token]) + WHOLE * (state == CLOSED) + CUT * (row["length"] >= row["room"])
            shared.setdefault(row["lease"], {}).setdefault((token, why), []).append(row)
            if why:
                left.append((row["owner"], why))
        self.rows = [row for row in self.rows if row["owner"] not in dict(left)]
        parting = {}
        for lease, classes in shared.items():
            keeps = next((which for which in classes if not which[1] & END), next(iter(classes)))
            ordered = [keeps, *(which for which in classes if which != keeps)]
            parting[lease] = [(not which[1] & END, classes[which]) for which in ordered]
        return left, parting


def check_parting(parting, change, tree, before):
    """That rows under one lease parted as `parting` says, and each class has, in blocks of its own, what the lease had."""
    told, forks = {owner: (lease, first) for owner, lease, first in change.parted}, 0
    for lease, ((_, keeping), *others) in parting.items():
        head, foremost = keeping[0]["owner"], min(row["owner"] for _, rows in [(0, keeping), *others] for row in rows)
        assert told.pop(head, None) == ((lease, True) if head != foremost else None)
        assert all(row["owner"] not in told for row in keeping)
        for needs, rows in others:
            (forked, first), *rest = (told.pop(row["owner"]) for row in rows)
            assert first and rest == [(forked, False)] * len(rest)
            for row in rows:
                row["lease"] = forked
            if not needs:
                assert forked == NO_NODE
            elif forked != NO_NODE:
                forks += 1
                assert forked != lease and tree.lease_start(forked) == tree.lease_start(lease)
                blocks = before[lease] // tree.block_size + (before[lease] % tree.block_size > 0)
                copies = [pair for pair in change.copies.tolist() if pair[1] in blocks_of(tree, forked, before[lease])]
                assert [pair[0] for pair in copies] == blocks_of(tree, lease, before[lease]) and len(copies) == blocks
    assert not told
    return forks


def blocks_of(tree, lease, count):
    slots = tree.write_slots([lease], [True], [0], [count])
    return (slots[:: tree.block_size] // tree.block_size).tolist()


def a_rule(gen, counts):
    after = None if counts else gen.integers(0, STATES, (STATES, VOCAB)).astype(np.uint8)
    return SimpleNamespace(after=after, eos=gen.random(VOCAB) < 0.1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), counts=st.booleans())
def test_rows_are_what_their_definition_says_tick_after_tick(seed, counts):
    gen, most = np.random.default_rng(seed), 9
    rule, rows, slowly, made = a_rule(gen, counts), Rows(most), Slowly(), 0
    tree = KVTree(num_blocks=int(gen.choice([30, 400])), block_size=2)
    prompt = tree.insert(NO_NODE, [1, 2, 3])
    written: dict[int, int] = {}  # by lease
    for _ in range(12):
        count, runs, sources = len(rows), [], []
        for _ in range(gen.integers(0, most - count + 1)):
            if len(rows) > count and gen.random() < 0.6:  # it begins as the one before it did
                lease, length = slowly.rows[-1]["lease"], slowly.rows[-1]["length"]
            else:
                lease, length = tree.lease(prompt), int(gen.integers(0, 3))
                if not tree.extend(lease, length):
                    tree.release(lease)
                    break
                written[lease] = length
            record = {"lease": lease, "identity": int(gen.integers(0, 1 << 62)) * 4 + 3,
                      "key": (int(gen.integers(0, 1 << 32)), made), "sampling": int(gen.integers(0, 2)),
                      "path_start": int(gen.integers(0, 99)), "length": length, "room": length + int(gen.integers(1, 6)),
                      "state": int(gen.choice([0, 1, 3, 4]))}  # fmt: skip
            rows.add(made, **record)
            slowly.rows.append(record | {"newest": 0, "owner": made})
            if not runs or gen.random() < 0.6:
                tokens = gen.integers(0, VOCAB, gen.integers(1, 4)).tolist()
                runs.append(Run(int(gen.integers(0, 99)), bool(gen.random() < 0.5), int(gen.integers(0, 9)), 3, tokens))
            sources.append(int(gen.integers(0, len(runs))))
            made += 1
        segments, read_at, drawn_at = rows.follow(runs, sources, count)
        columns, reads, drawn = slowly.follow(runs, sources, count)
        assert {name: getattr(segments, name).tolist() for name in columns} == columns
        assert (read_at.tolist(), drawn_at.tolist()) == (reads, drawn)
        for sampling in (0, 1, 2):
            given = tuple(column.tolist() for column in rows.draws(sampling, drawn_at))
            assert given == slowly.draws(sampling, drawn)
        tokens = gen.integers(0, VOCAB, len(rows))
        change = rows.append(tokens, rule, tree)
        left, parting = slowly.append(tokens.tolist(), rule)
        assert change.left == left
        check_parting(parting, change, tree, written)
        slowly.rows = [row for row in slowly.rows if row["lease"] != NO_NODE]
        rows.keep(rows.table["lease"] != NO_NODE)
        assert rows.leases.tolist() == list(dict.fromkeys(row["lease"] for row in slowly.rows))
        for lease in {*written, *(lease for _, lease, _ in change.parted)} - {NO_NODE, *(row["lease"] for row in slowly.rows)}:
            tree.release(lease)
        if tree.extend_many(rows.leases) < len(rows.leases):
            return
        written = {row["lease"]: row["length"] for row in slowly.rows}
        if len(rows) and gen.random() < 0.2:
            assert rows.pop() == slowly.rows.pop()["owner"]
        if gen.random() < 0.2:
            stays = gen.random(len(rows)) < 0.7
            rows.keep(stays)
            slowly.rows = [row for row, stay in zip(slowly.rows, stays, strict=True) if stay]
        assert rows.owners == [row["owner"] for row in slowly.rows]
        for name in rows.table.dtype.names:
            assert rows.table[name].tolist() == [list(row[name]) if name == "key" else row[name] for row in slowly.rows]


def test_records_can_be_written():
    rows = Rows(2)
    rows.add("a", lease=5, identity=1, key=(2, 3), sampling=0, path_start=4, length=1, room=9, state=0)
    rows.table["newest"] = 6
    segments, _, _ = rows.follow([], [], 1)
    assert segments.token_ids.tolist() == [6]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda rows, rule: rows.append(np.array([VOCAB]), rule, A_TREE),
        lambda rows, rule: rows.append(np.array([-1]), rule, A_TREE),
        lambda rows, rule: rows.append(np.array([0, 0]), rule, A_TREE),
        lambda rows, rule: rows.follow([], [0], 1),
        lambda rows, rule: rows.follow([], [], 2),
        lambda rows, rule: rows.draws(0, np.array([0, 0])),
        lambda rows, rule: rows.add("b", lease=5, identity=1, key=(2, 3), sampling=0, path_start=4, length=1, room=9, state=0),
    ],
)
def test_misuse_is_refused_and_changes_nothing(misuse):
    rows, rule = Rows(1), a_rule(np.random.default_rng(0), counts=False)
    rows.add("a", lease=5, identity=1, key=(2, 3), sampling=0, path_start=4, length=1, room=9, state=0)
    before = str(rows.table)
    with pytest.raises(ValueError):
        misuse(rows, rule)
    assert rows.owners == ["a"] and str(rows.table) == before
