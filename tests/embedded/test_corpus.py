"""What the embedded models are trained on."""

import itertools

import torch

from tts_engine.embedded.corpus import (
    FIRST_ERROR,
    GOOD,
    IGNORE,
    LATER_ERROR,
    Trajectory,
    batches,
    corrupted_gold,
    labelled_rows,
    solved_rows,  # fmt: skip
    training_programs,
)
from tts_engine.embedded.tokenizer import build_tokenizer
from tts_engine.prm.spec import PRMSpec, TokenPair


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


def test_targets_of_a_prm_stand_where_its_scores_are_read():
    spec = PRMSpec(family="x", opening=lambda problem: [7, 7], step=lambda text, first: [1] * len(text) + [9, 8], read_at=-2,
                   readout=TokenPair(plus=1, minus=2))  # fmt: skip
    [(ids, targets)] = labelled_rows(spec, [Trajectory("p", ("ab", "c", "d"), (True, False, False))])
    ref = [IGNORE, IGNORE, IGNORE, IGNORE, GOOD, IGNORE, IGNORE, FIRST_ERROR, IGNORE, IGNORE, LATER_ERROR, IGNORE]
    assert targets == ref
    assert [ids[i] for i, target in enumerate(targets) if target != IGNORE] == [9, 9, 9]


def test_every_second_trajectory_of_the_poor_prm_has_one_other_digit():
    spoilt = list(itertools.islice(corrupted_gold(5), 40))
    assert all(all(t.labels) for t in spoilt[::2])
    assert sum(not all(t.labels) for t in spoilt[1::2]) >= 5  # a wrong operand with the right result is no wrong statement
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
