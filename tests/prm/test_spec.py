"""A spec renders paths append-only and reads each step inside its own ids."""

import dataclasses

import pytest

from tts_engine.prm.spec import PRMSpec, TokenPair, TwoClassHead, ValueHead

MARKER, LINE_END = 900, 901


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def spec(read_at: int = -2) -> PRMSpec:
    """One id a character; the first step begins with 0, each ends with marker and line end."""
    return PRMSpec(
        family="toy",
        opening=letters,
        step=lambda text, first: [0] * first + letters(text) + [MARKER, LINE_END],
        read_at=read_at,
        readout=TokenPair(1, 2),
    )


def test_a_path_is_the_opening_and_its_steps_in_order():
    ids, positions = spec().render("ab", ["c", "", "de"])
    assert ids == [97, 98, 0, 99, MARKER, LINE_END, MARKER, LINE_END, 100, 101, MARKER, LINE_END]
    assert positions == [4, 6, 10]
    assert all(ids[position] == MARKER for position in positions)


def test_a_path_without_steps_is_its_opening():
    assert spec().render("ab", []) == ([97, 98], [])


def test_only_the_first_step_is_told_so():
    ids, _ = spec().render("", ["c", "c", "c"])
    assert ids.count(0) == 1


def test_rendering_does_not_touch_an_opening_that_is_kept():
    opening = [7]
    kept = dataclasses.replace(spec(), opening=lambda problem: opening)
    kept.render("", ["c"])
    assert opening == [7]


@pytest.mark.parametrize("read_at", [0, 1])
def test_a_step_cannot_be_read_behind_its_own_ids(read_at):
    with pytest.raises(AssertionError, match="inside its own ids"):
        spec(read_at)


def test_heads_name_their_tensors():
    assert TwoClassHead().tensors == {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"}
    assert TwoClassHead("a", "b").tensors == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert ValueHead().tensors == {"v_head.summary.weight", "v_head.summary.bias"}
    assert ValueHead("value").tensors == {"value.weight", "value.bias"}
