"""What the embedded models are trained on."""

import itertools
import random
import re

import pytest
import torch

from tts_engine.embedded.corpus import (
    FIRST_ERROR,
    GOOD,
    IGNORE,
    LATER_ERROR,
    RIGHT_DIGIT,
    WRONG_DIGIT,
    Trajectory,
    arithmetic_drill,
    batches,
    checked_rows,
    checked_solution,
    corrupted_gold,
    labelled,
    labelled_rows,
    proof,
    solved_rows,
    training_programs,
)
from tts_engine.embedded.tokenizer import build_tokenizer
from tts_engine.prm.spec import PRMSpec, TokenPair
from tts_engine.tasks.programs import Operation, Program, apply, stated_operation


def test_training_problems_are_of_the_training_split_and_the_same_for_a_seed():
    programs = list(itertools.islice(training_programs(3), 60))
    assert {program.split for program in programs} == {"train"}
    assert {program.level for program in programs} == {1, 2, 3}
    assert programs == list(itertools.islice(training_programs(3), 60))


def test_a_policy_learns_the_solution_and_not_the_problem():
    tokenizer = build_tokenizer()
    for ids, targets in itertools.islice(solved_rows(tokenizer, 1), 20):
        assert len(ids) == len(targets)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        problem = text.index("?") + 2
        assert targets[: problem - 1] == [IGNORE] * (problem - 1)
        assert targets[problem - 1 : -1] == ids[problem:]  # the next token, from the one after the problem's line end on
        assert targets[-1] == tokenizer.token_to_id("<|endoftext|>")


def test_a_checked_solution_ends_each_step_with_what_is_right_and_learns_no_mistake():
    slips = checks = 0
    for program in itertools.islice(training_programs(4), 200):
        pieces = list(checked_solution(program, random.Random(program.text)))
        *steps, boxed = "".join(text for text, _ in pieces).split("\n\n")
        assert boxed == f"\\boxed{{{program.answer}}}" and len(steps) == len(program.operations)
        wrong = []
        for step in steps:
            asked = re.match(r"(\w)=(-?\d+)([-+*/%])(-?\d+)", step)
            value = apply(int(asked[2]), asked[3], int(asked[4]))
            assert value == program.values[asked[1]]
            *redone, last = re.findall(r"=(-?\d+) \(([^ ]+) (ok|no)\)", step)
            assert (int(last[0]), last[2]) == (value, "ok")
            assert all(int(stated) != value and verdict == "no" for stated, _, verdict in redone)
            wrong += [f"{stated} " for stated, _, _ in redone]
            checks += 1
        assert [text for text, learned in pieces if not learned] == wrong
        slips += len(wrong)
    assert 0.3 < slips / checks < 0.5  # 0.3 + 0.3^2 of them


def test_a_checked_solution_is_of_the_same_problems_as_a_plain_one():
    tokenizer = build_tokenizer()
    for (ids, targets), (plain, _) in itertools.islice(
        zip(checked_rows(tokenizer, 1), solved_rows(tokenizer, 1), strict=False), 20
    ):
        problem = tokenizer.decode(ids).split("\n")[0]
        assert problem == tokenizer.decode(plain).split("\n")[0] and len(ids) == len(targets)
        shifted = [*ids[1:], tokenizer.token_to_id("<|endoftext|>")]
        assert all(target in (IGNORE, next) for target, next in zip(targets, shifted, strict=True))
        assert targets[: len(problem)] == [IGNORE] * len(problem) and IGNORE not in targets[-len("\\boxed{1}") :]


@pytest.mark.parametrize(
    ("operation", "right", "wrong"),
    [
        ((47, "+", 38, 85), "85-38=47", "75-38=37"),
        ((5, "-", 17, -12), "-12+17=5", "-22+17=-5"),
        ((96, "/", 8, 12), "12*8=96", "2*8=16"),
        ((100, "%", 7, 2), "14*7+2=100", "14*7+-8=90"),
        ((67, "*", 83, 5561), "4980+581=5561", "4980+581=5561"),
        ((-45, "*", 12, -540), "-480+-60=-540", "-480+-60=-540"),
        ((6, "*", 83, 498), "480+18=498", "480+18=498"),
    ],
)  # fmt: skip
def test_a_proof_goes_another_way_and_shows_what_is_wrong(operation, right, wrong):
    left, op, other, value = operation
    assert proof(left, op, other, value) == right
    assert proof(left, op, other, value - 10) == wrong


def test_a_trajectory_has_one_first_error_and_no_hope_after_it():
    program = Program((Operation("a", 47, "+", 38), Operation("b", "a", "*", 2)), level=1)
    assert labelled(program, ["a=47+38=85", "b=85*2=170", "\\boxed{170}"]).kinds == (GOOD, GOOD, GOOD)
    assert labelled(program, ["a=47+38=75", "b=75*2=150", "\\boxed{150}"]).kinds == (FIRST_ERROR, LATER_ERROR, LATER_ERROR)


@pytest.mark.parametrize(
    ("step", "digits"),
    [
        ("a=47+38=85", [RIGHT_DIGIT, RIGHT_DIGIT]),
        ("a=47+38=75", [WRONG_DIGIT]),  # nothing is said of what follows the first wrong one
        ("a=47+38=8", [RIGHT_DIGIT]),  # cut short: wrong as a step, right as far as it goes
        ("a=47+38=851", [RIGHT_DIGIT, RIGHT_DIGIT]),
        ("a=5-17=-13", [RIGHT_DIGIT, RIGHT_DIGIT, WRONG_DIGIT]),
        ("a=5/0=3", []),
        ("a=5+=3", []),
        ("\\boxed{85}", []),
    ],
)  # fmt: skip
def test_targets_of_a_prm_stand_at_results_and_where_scores_are_read(step, digits):
    spec = PRMSpec(family="x", opening=lambda problem: [7, 7], step=lambda text, first: [*text.encode(), 3, 8], read_at=-2,
                   readout=TokenPair(plus=1, minus=2))  # fmt: skip
    rows = labelled_rows(spec, ord("="), [Trajectory("p", ("c=1+1=2", step), (GOOD, FIRST_ERROR))])
    [(ids, targets)] = rows
    ref = [IGNORE] * 8 + [RIGHT_DIGIT, GOOD, IGNORE]
    ref += [IGNORE] * (step.rfind("=") + 1) + digits
    ref += [IGNORE] * (len(ids) - 2 - len(ref)) + [FIRST_ERROR, IGNORE]
    assert targets == ref


def test_half_of_a_drill_is_wrong_by_its_own_arithmetic():
    drill = list(itertools.islice(arithmetic_drill(9), 300))
    pairs = [(step, kind) for t in drill for step, kind in zip(t.steps, t.kinds, strict=True)]
    for step, kind in pairs:
        left, op, right, stated = stated_operation(step)
        assert kind == (GOOD if apply(left, op, right) == stated else FIRST_ERROR)
    assert 0.45 < sum(kind == GOOD for _, kind in pairs) / len(pairs) < 0.55
    assert {op for step, _ in pairs for op in "+-*/%" if stated_operation(step)[1] == op} == set("+-*/%")


def test_every_second_trajectory_of_the_poor_prm_has_one_other_digit():
    spoilt = list(itertools.islice(corrupted_gold(5), 40))
    assert all(set(t.kinds) == {GOOD} for t in spoilt[::2])
    assert sum(FIRST_ERROR in t.kinds for t in spoilt[1::2]) >= 5  # a wrong operand with the right result is no wrong statement
    assert all(len(t.problem) < 80 for t in spoilt)


def test_batches_hold_every_row_padded_and_stop_at_the_budget():
    rows = [([i + 2] * (5 + i % 70), [i] * (5 + i % 70)) for i in range(500)]
    seen, spent = [], 0
    for ids, targets, real in batches(rows, batch_tokens=256, total_tokens=6000, seed=0):
        assert ids.shape == targets.shape and ids.shape[1] % 32 == 0
        assert real == int((targets != IGNORE).sum())
        assert torch.equal(ids[targets != IGNORE] - 2, targets[targets != IGNORE])
        seen += ids[:, 0].tolist()
        spent += real
    assert len(seen) == len(set(seen)) and 6000 <= spent < 6000 + 256
