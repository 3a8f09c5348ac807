import hashlib
import itertools
import random
import re
from collections import Counter

import pytest

from tts_engine.tasks.programs import (
    HASH_RANGES,
    LIMIT,
    OPERATIONS_BY_LEVEL,
    SPLIT_SIZES,
    Operation,
    Program,
    apply,
    draw_program,
    draw_programs,
    solve,
    split_programs,
    step_labels,
)

# One problem a line, of the whole split: a change here means that published figures are of other problems.
TEXTS_SHA256 = {
    "test": "a12fae937dc044dd5202772c2330120e76c425028025339c0409a828dbb318a7",
    "calibration": "be06fc121e391bcfce8f7289c5057a109009f484a416d7b782888d170f3267a7",
    "prm_dev": "487711ab2e40177ae998cd53885f834ae476aa5246a10a3850074606f83f0236",
}

EXAMPLE = Program(  # a=47+38;b=6*9;c=a-b;d=c*7;d?
    (Operation("a", 47, "+", 38), Operation("b", 6, "*", 9), Operation("c", "a", "-", "b"), Operation("d", "c", "*", 7)), 2
)


@pytest.fixture(scope="module")
def programs() -> list[Program]:
    rng = random.Random(5)
    return [draw_program(level, rng) for level in (1, 2, 3) for _ in range(150)]


def test_the_text_and_the_answer_of_an_example():
    assert EXAMPLE.text == "a=47+38;b=6*9;c=a-b;d=c*7;d?"
    assert EXAMPLE.answer == 217


def test_values_stay_in_range_and_operations_in_their_level(programs: list[Program]):
    for program in programs:
        fewest, most = OPERATIONS_BY_LEVEL[program.level]
        assert fewest <= len(program.operations) <= most
        assert all(abs(value) <= LIMIT for value in program.values.values())


def test_each_target_but_the_last_is_used_exactly_once(programs: list[Program]):
    for program in programs:
        targets = [operation.target for operation in program.operations]
        used = Counter(x for o in program.operations for x in (o.left, o.right) if isinstance(x, str))
        assert used == dict.fromkeys(targets[:-1], 1)


def test_every_solution_is_good_throughout_and_ends_in_the_answer(programs: list[Program]):
    rng = random.Random(6)
    for program in programs:
        steps = solve(program, rng)
        assert step_labels(program, steps) == [True] * len(steps)
        assert steps[-1] == rf"\boxed{{{program.answer}}}"


def test_solutions_come_in_more_than_one_order():
    rng = random.Random(7)
    orders = {"".join(step[0] for step in solve(EXAMPLE, rng)[:-1]) for _ in range(50)}
    assert orders == {"abcd", "bacd"}


def test_one_corrupted_digit_is_bad_from_there_on_unless_the_answer_survives_it(programs: list[Program]):
    rng = random.Random(8)
    bad = 0
    for program in programs:
        steps = solve(program, rng)
        position = rng.randrange(len(steps))
        at = rng.choice([m.start() for m in re.finditer(r"[0-9]", steps[position]) if m.start() > steps[position].rfind("=")])
        digit = rng.choice([d for d in "0123456789" if d != steps[position][at]])
        steps[position] = steps[position][:at] + digit + steps[position][at + 1 :]
        if _final(program, steps) == program.answer:
            continue
        assert step_labels(program, steps) == [True] * position + [False] * (len(steps) - position)
        bad += 1
    assert bad > 0.9 * len(programs)


def _final(program: Program, steps: list[str]) -> int | None:
    """What the problem's last target becomes if every stated value is believed up to and including the wrong one."""
    box = re.fullmatch(r"\\boxed\{(-?[0-9]+)\}", steps[-1])
    if box and int(box[1]) != program.answer:
        return int(box[1])
    right = program.values
    wrong = next(((s[0], int(s.rsplit("=", 1)[1])) for s in steps[:-1] if int(s.rsplit("=", 1)[1]) != right[s[0]]), None)
    values: dict[str, int | None] = {}
    for o in program.operations:
        left, operand = (values[x] if isinstance(x, str) else x for x in (o.left, o.right))
        values[o.target] = None if left is None or operand is None else apply(left, o.op, operand)
        if wrong and o.target == wrong[0]:
            values[o.target] = wrong[1]
    return values[program.operations[-1].target]


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (["b=6*9=54", "a=47+38=85", "c=85-54=31", "d=31*7=217", r"\boxed{217}"], [True] * 5),
        (["a=47+38=85", r"\boxed{217}"], [True, True]),
        (["a=47+38=86", "b=6*9=53"], [False, False]),
        (["a=47+38=85", "a=47+38=85"], [True, False]),
        (["c=85-54=31"], [False]),
        (["a=47+38=85", "nonsense", "b=6*9=54"], [True, False, False]),
        (["e=1+1=2"], [False]),
        ([r"\boxed{216}"], [False]),
        ([r"\boxed{217} "], [False]),
        ([], []),
    ],
)
def test_labels_by_hand(steps: list[str], labels: list[bool]):
    assert step_labels(EXAMPLE, steps) == labels


def test_an_error_that_cannot_reach_the_answer_is_forgiven():
    # 7 % 5 and 12 % 5 are both 2: the wrong sum leaves the right answer in reach, so its step is good.
    program = Program((Operation("a", 3, "+", 4), Operation("b", "a", "%", 5)), 1)
    assert step_labels(program, ["a=3+4=12", "b=12%5=2", r"\boxed{2}"]) == [True, True, True]


def test_a_value_that_makes_the_rest_impossible_is_bad():
    program = Program((Operation("a", 3, "-", 1), Operation("b", 8, "/", "a")), 1)
    assert step_labels(program, ["a=3-1=0"]) == [False]


def test_the_hash_ranges_cover_every_program_once():
    bounds = sorted(HASH_RANGES.values())
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 100
    assert all(high == low for (_, high), (low, _) in itertools.pairwise(bounds))


def test_a_program_that_differs_in_spelling_only_falls_into_the_same_split():
    respelt = Program(
        (Operation("x", 9, "*", 6), Operation("y", 38, "+", 47), Operation("z", "y", "-", "x"), Operation("w", 7, "*", "z")), 3
    )
    assert respelt.canonical == EXAMPLE.canonical
    assert respelt.split == EXAMPLE.split


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Program]]:
    return {split: split_programs(split) for split in SPLIT_SIZES}


def test_splits_are_distinct_disjoint_and_pinned(held_out: dict[str, list[Program]]):
    seen: set[str] = set()
    for split, size in SPLIT_SIZES.items():
        programs = held_out[split]
        assert {program.split for program in programs} == {split}
        canonicals = {program.canonical for program in programs}
        assert len(canonicals) == len(programs) == size
        assert not canonicals & seen
        seen |= canonicals
        assert hashlib.sha256("\n".join(program.text for program in programs).encode()).hexdigest() == TEXTS_SHA256[split]


def test_training_programs_are_in_no_held_out_split(held_out: dict[str, list[Program]]):
    stream = draw_programs("train", 1, random.Random(9))
    canonicals = {program.canonical for programs in held_out.values() for program in programs}
    assert not {next(stream).canonical for _ in range(500)} & canonicals
