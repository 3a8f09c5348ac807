"""Where a step ends: markers, however tokens cut them, and drawn lengths."""

import random
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tts_engine.branch import Finish, root_branch
from tts_engine.config import EngineConfig
from tts_engine.engine import Engine
from tts_engine.errors import EngineError
from tts_engine.models.tokenizer import load_tokenizer, token_bytes
from tts_engine.sampling import philox
from tts_engine.search import Cot, make_method
from tts_engine.steps import CLOSED, NO_POSITION, NO_TEXT, STEP_MARKERS, DrawnLengths, MarkedSteps
from tts_engine.testing import chain_policy, draw_all, random_policy_directory, random_prm_directory


def written(pieces: list[bytes], ends: tuple[int, ...] = (), mode: str = "blank-line", **limits: int):
    """(text, finish) of each step that a policy writes after piece 0, until it ends."""
    policy = chain_policy([b"?", *pieces], ends=ends)
    policy.rule = MarkedSteps([b"?", *pieces], ends, len(policy.rule.eos), mode)
    drawn = draw_all(policy, Cot(max_steps=limits.pop("max_steps", 8)).program(root_branch([0])), 1, max_steps=8, **limits)
    return [(step.text, step.finish) for step in drawn.branches[0].steps]


@pytest.mark.parametrize(
    "pieces",
    [[b"a", b"\n\n", b"b", b"$"], [b"a\n\nb", b"$"], [b"a\n", b"\nb", b"$"], [b"a", b"\n", b"\n", b"b", b"$"],
     [b"a.\n\n", b"b", b"$"], [b"a", b"\n", b"\n\n", b"b", b"$"], [b"\n\n", b"a", b"\n\n", b"b", b"$"], [b"\n\na\n\n", b"b", b"$"]],
    ids=["a token of its own", "inside a token", "across two", "across three", "at a token's end", "three line ends",
         "after leading line ends", "after leading line ends in one token"],
)  # fmt: skip
def test_a_step_ends_with_the_token_that_completes_a_blank_line(pieces):
    steps = written(pieces, ends=(len(pieces),))
    assert len(steps) == 2
    assert steps[0][1] is None and steps[1][1] is Finish.EOS
    assert "".join(text for text, _ in steps) == b"".join(pieces).decode()


@pytest.mark.parametrize("pieces", [[b"\n\n", b"\n", b" \n\n", b"a"], [b"\n", b"\n", b"a"], [b"\n\n\n a"]])
def test_leading_line_ends_close_no_step(pieces):
    assert written([*pieces, b"$"], ends=(len(pieces) + 1,)) == [((b"".join(pieces) + b"$").decode(), Finish.EOS)]


def test_a_silent_token_between_two_line_ends_does_not_part_them():
    assert written([b"a\n", b"", b"\n", b"b", b"$"], ends=(5,)) == [("a\n\n", None), ("b$", Finish.EOS)]


def test_a_space_between_two_line_ends_makes_no_blank_line():
    assert written([b"a\n", b" ", b"\n", b"b", b"$"], ends=(5,)) == [("a\n \nb$", Finish.EOS)]


def test_an_end_token_is_silent_and_ends_the_branch_even_on_a_boundary():
    assert written([b"a", b""], ends=(2,)) == [("a", Finish.EOS)]
    assert written([b"a", b"\n\n"], ends=(2,)) == [("a\n\n", Finish.EOS)]


def test_a_step_that_closes_with_a_boxed_answer_ends_the_branch():
    steps = written([b"x=1", b"\n\n", b"\\box", b"ed{1}", b"\n\n", b"more"])
    assert steps == [("x=1\n\n", None), ("\\boxed{1}\n\n", Finish.ANSWER)]


def test_a_step_is_cut_at_its_limit_and_not_where_it_closes_there():
    assert written([b"a", b"b", b"c", b"\n\n", b"d", b"$"], ends=(6,), max_step_tokens=3) == [("abc", Finish.LENGTH)]
    assert written([b"a", b"b", b"c", b"\n\n", b"d", b"$"], ends=(6,), max_step_tokens=4) == [("abc\n\n", None), ("d$", Finish.EOS)]


@pytest.mark.parametrize("limit", [{"max_tokens": 4}, {"max_positions": 5}], ids=str)
def test_a_branch_is_cut_where_its_tokens_or_the_models_positions_are_used_up(limit):
    assert written([b"a", b"\n\n", b"c", b"d", b"e", b"$"], **limit) == [("a\n\n", None), ("cd", Finish.LENGTH)]


def test_a_step_that_closes_on_the_last_position_leaves_no_room_for_another():
    assert written([b"a", b"\n\n", b"c"], max_tokens=2) == [("a\n\n", Finish.LENGTH)]


def test_a_trajectory_ends_at_the_step_limit():
    policy = chain_policy([b"?", b"a\n\n"])
    drawn = draw_all(policy, Cot(max_steps=3).program(root_branch([0])), 1, max_steps=3)
    assert [step.finish for step in drawn.branches[0].steps] == [None, None, Finish.DEPTH]


def test_a_character_across_tokens_is_one_character_of_the_step():
    assert written([b"\xe2\x82", b"\xac", b"$"], ends=(3,)) == [("€$", Finish.EOS)]


@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ("blank-line", ["Hm.\n\n\n", "## Step 1: a\nStep 12: b$"]),
        ("header", ["Hm.\n\n\n## Step", " 1: a\nStep 12: b$"]),
        ("numbered", ["Hm.\n\n\n## Step 1: a\nStep 12:", " b$"]),
    ],
)
def test_a_header_is_the_end_of_the_step_before_it(mode, steps):
    pieces = [b"H", b"m.\n", b"\n\n", b"##", b" Step", b" 1: a\n", b"Step", b" ", b"12", b":", b" b", b"$"]
    out = written(pieces, ends=(12,), mode=mode)
    assert [text for text, _ in out] == steps
    assert [finish for _, finish in out] == [*[None] * (len(steps) - 1), Finish.EOS]


WHITE_SPACE = " \t\n\r\v\f"


def closes(mode: str, text: str) -> bool:
    """The definition: whether a step that says `text` is over, line by line."""
    if mode == "blank-line":
        return "\n\n" in text.lstrip(WHITE_SPACE)
    header = {"header": "## Step", "numbered": "Step [0-9]+:"}[mode]
    lines = text.split("\n")
    return any(re.match(header, line) and "".join(lines[:i]).strip(WHITE_SPACE) for i, line in enumerate(lines))


def assert_closes_as_defined(rule: MarkedSteps, mode: str, tokens: list[int]) -> bool:
    """The rule closes with the token that the definition says, the state resting from there on; whether there is one."""
    states = np.full(1, NO_TEXT, np.uint8)
    for i, token in enumerate(tokens):
        states = rule.advance(np.array([token]), states)
        ref = closes(mode, b"".join(rule.token_bytes[t] for t in tokens[: i + 1]).decode("utf-8", "replace"))
        assert (states[0] == CLOSED) == ref, (mode, [rule.token_bytes[t] for t in tokens[: i + 1]])
    return ref


PARTS = [b"a", b"\n", b" ", b"\xac", b"#", b"Step", b"S", b"t", b"e", b"p", b" 1", b"2", b":", b"## Step", b"\nStep 3"]
byte_tokens = st.lists(st.lists(st.sampled_from(PARTS), max_size=5).map(b"".join), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(pieces=byte_tokens, mode=st.sampled_from(sorted(STEP_MARKERS)))
@example(pieces=[b"a\n", b"", b"", b"\n"], mode="blank-line")
@example(pieces=[b"\n", b"\na\n", b"\n"], mode="blank-line")
@example(pieces=[b"a\n#", b"\n## St", b"ep"], mode="header")
@example(pieces=[b"a\nStep 1", b"2", b"\nStep ", b"34", b":"], mode="numbered")
@example(pieces=[b"a\nStep ", b"\xb2:", b"\nStep :", b"1:"], mode="numbered")
def test_a_step_closes_where_the_bytes_so_far_hold_the_marker_behind_text(pieces, mode):
    assert_closes_as_defined(MarkedSteps(pieces, [], len(pieces) + 3, mode), mode, list(range(len(pieces))))


def cut_at_random(text: bytes, id_of: dict[bytes, int], rng: random.Random) -> list[int]:
    """Some ids of the vocabulary that say `text`: hardly ever those that the tokenizer would choose."""
    ids = []
    while text:
        length = rng.choice([n for n in range(1, 17) if text[:n] in id_of])
        ids.append(id_of[text[:length]])
        text = text[length:]
    return ids


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.1", "mistral-7b-v0.1"])
def test_steps_close_alike_however_real_vocabularies_cut_the_text(shared, name):
    if not (shared / "tokenizers" / name).is_dir():
        pytest.skip(f"needs the tokenizer of {name}")
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    table, rng = token_bytes(tokenizer), random.Random(41)
    id_of = {piece: i for i, piece in enumerate(table) if piece}
    closed = dict.fromkeys(STEP_MARKERS, 0)
    parts = "\n|\n|\n\n|\n## Step|## Step|\nStep 4:|\nStep |Step|#| |7|12:|:|Let x|\u00bd|\u6f22|\u00a0|.\r\n".split("|")
    for _ in range(150):
        text = "".join(rng.choices(parts, k=rng.randint(1, 14)))
        for ids in (cut_at_random(text.encode(), id_of, rng), tokenizer(text, add_special_tokens=False)["input_ids"]):
            used = sorted(set(ids))
            for mode in STEP_MARKERS:
                rule = MarkedSteps([table[i] for i in used], [], len(used), mode)
                closed[mode] += assert_closes_as_defined(rule, mode, [used.index(i) for i in ids])
    assert min(closed.values()) > 10


def test_an_engine_cuts_steps_as_it_is_told(tmp_path):
    random_policy_directory(tmp_path)
    with Engine.from_pretrained(tmp_path, steps="header", kv_bytes=1 << 20) as engine:
        rule = engine.policy.rule
        for mode in STEP_MARKERS:
            same = np.array_equal(rule.after, MarkedSteps(rule.token_bytes, [], len(rule.token_bytes), mode).after)
            assert same == (mode == "header")


@pytest.mark.parametrize("mode", ["lines", "0", "-3", "1.5", "9999999", "\u0663", ""])
def test_a_mode_that_is_none_is_refused(mode):
    with pytest.raises(EngineError, match=r"steps='.*' is unknown; known: blank-line, header, numbered, or a mean"):
        EngineConfig(steps=mode)


def test_ids_beyond_the_tokenizer_add_nothing():
    rule = MarkedSteps([b"a", b"b"], [1], 5)
    assert rule.text([0, 4, 1, 2]) == "ab"
    assert rule.eos.tolist() == [False, True, False, False, False]


# Drawn lengths.


@pytest.mark.parametrize("mean", [1, 2, 7, 50])
def test_a_drawn_length_hangs_on_key_and_identity_and_is_uniform_around_its_mean(mean):
    rule = DrawnLengths(mean, 3)
    lengths = [rule.start(identity << 32 | 5, (1, 2)) - CLOSED for identity in range(3000)]
    assert set(lengths) == set(range(mean - mean // 2, mean + mean // 2 + 1))
    assert abs(np.mean(lengths) - mean) < 0.05 * mean
    assert lengths == [rule.start(identity << 32 | 5, (1, 2)) - CLOSED for identity in range(3000)]
    if mean > 1:
        assert lengths != [rule.start(identity << 32 | 5, (1, 3)) - CLOSED for identity in range(3000)]
    counters = np.array([(0, NO_POSITION, 5, high) for high in range(3000)], np.uint32)
    words = philox(counters, np.array((1, 2), np.uint32))[:, 0].astype(int)
    assert lengths == (mean - mean // 2 + words % (2 * (mean // 2) + 1)).tolist()


def test_a_step_of_a_drawn_length_closes_with_its_last_token_and_rests():
    rule = DrawnLengths(9, 4)
    states = np.array([rule.start(identity, (0, 0)) for identity in range(5)], np.int32)
    lengths = states - CLOSED
    for drawn in range(1, 16):
        states = rule.advance(np.zeros(5, np.int64), states)
        assert np.array_equal(states == CLOSED, lengths <= drawn)


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.1", "mistral-7b-v0.1"])
def test_the_text_of_a_drawn_length_is_as_many_tokens_to_anyone(shared, name):
    if not (shared / "tokenizers" / name).is_dir():
        pytest.skip(f"needs the tokenizer of {name}")
    tokenizer, rng = load_tokenizer(shared / "tokenizers" / name), random.Random(3)
    lone = len(tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    for length in (1, 2, 3, 50):
        text = DrawnLengths(length, 1 << 17).text([rng.randrange(1 << 17) for _ in range(length)])
        assert len(tokenizer("\n\n" + text, add_special_tokens=False)["input_ids"]) == lone + length


def test_a_search_of_drawn_lengths_does_the_same_work_whatever_the_model_says(tmp_path):
    work = []
    for seed in (1, 2):
        policy, prm = tmp_path / f"policy-{seed}", tmp_path / f"prm-{seed}"
        random_policy_directory(policy, seed=seed)
        random_prm_directory(prm, "qwen2.5-math-prm", seed=seed)
        with Engine.from_pretrained(policy, prm, steps="6", kv_bytes=1 << 22) as engine:
            [result] = engine.search("1+1", make_method("best_of_n", n=5, max_steps=4))
        assert {branch.finish for branch in result.branches} == {Finish.DEPTH}
        counts = ("tokens_computed", "linear_flops", "attention_flops", "head_flops", "padding_flops")
        work.append([getattr(part, count) for part in (result.ledger.policy, result.ledger.prm) for count in counts])
    assert work[0] == work[1]
    assert result.ledger.policy.tokens_generated > 0
