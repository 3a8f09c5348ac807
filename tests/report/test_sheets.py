"""A comparison's tables as text."""

import io

import pytest
from rich.console import Console

from tts_engine.report.arms import Difficulty, study
from tts_engine.report.efficiency import Factor
from tts_engine.report.sheets import LONGEST, Sheet, _factor, sheets, show, unit_of

HOSTILE = 'a|<b>"\x1b[31m\u202e' + "x" * 100


def named(line_up, difficulty=()):
    return {sheet.name: sheet for sheet in sheets(study(line_up, {}, difficulty))}


def test_the_tables_hold_the_figures_of_the_records(line_up):
    found = named(line_up)
    assert list(found) == ["accuracy", "by-level", "sizes", "gain", "winners", "ledger", "memory", "runs"]
    assert found["accuracy"].rows[4] == ("small", "judge", "beam", "16", "100.0 (91-100)", "16", "16", "32")
    assert found["accuracy"].rows[0] == ("small", "-", "cot", "1", "25.0 (14-40)", "1", "-", "1")
    assert found["accuracy"].headings[-1] == "both\nMFLOP"
    assert found["by-level"].headings[-2:] == ("level 1\nof 20", "level 2\nof 20")
    assert found["by-level"].rows[0][-2:] == ("25.0 (11-47)", "25.0 (11-47)")
    assert found["sizes"].rows[1] == ("small", "-", "majority", "16", "75.0", "16", "large", "50.0", "10", "1.60x",
                                      "+25.0 (+12.5 to +40.0)", "holds")  # fmt: skip
    assert found["gain"].rows[1][4] == "100.0" and found["gain"].rows[1][-1].startswith("2.00x (")
    tied = "beam\ntied: majority\n75.0 of 20"  # five problems that differ tell nothing, ten do
    assert found["winners"].rows[0] == ("small", "judge", "4", "beam\nahead of all\n75.0 of 40", tied, tied)
    assert found["memory"].rows[4][4:] == ("160", "160 k", "2 kB", "4 kB")  # what re-reading would read is 0 everywhere
    assert found["runs"].rows[0] == ("small", "-", "cot", "1", "small-none-cot-1-0", "0", "40", "0", "searched", "float32",
                                     "2026-01-02 03:04", "0.1.0")  # fmt: skip


def test_what_is_zero_everywhere_has_no_column(line_up):
    assert "padding\nFLOPs %" not in named(line_up)["ledger"].headings
    assert [heading.split("\n")[0] for heading in named(line_up)["ledger"].headings[4:]] == [
        "s a",
        "policy",
        "PRM",
        "grading",
        "executed",
        "useful",
    ]


def test_bins_of_each_policys_own_say_how_many_problems(line_up):
    policies = [line_up[i].description["policy"]["sha256"] for i in (0, 5)]
    bins = [Difficulty(policy, ("easy", "hard"), {f"p{i:03}": "easy" if i < cut else "hard" for i in range(40)})
            for policy, cut in zip(policies, (10, 20), strict=True)]  # fmt: skip
    sheet = named(line_up, bins)["by-pass-rate"]
    assert sheet.headings[-2:] == ("pass@1 easy\n", "pass@1 hard\n")
    assert sheet.rows[0][-2:] == ("100.0 (72-100) of 10", "0.0 (0-11) of 30")
    assert sheet.rows[-1][-2:] == ("100.0 (84-100) of 20", "0.0 (0-16) of 20")


def test_tables_without_a_row_are_left_out(run_of):
    assert list(named([run_of("cot", 1, [1], 10, levels=())])) == ["accuracy", "ledger", "memory", "runs"]


@pytest.mark.parametrize(
    ("flops", "unit"), [(5, "FLOP"), (3 * 10**9, "GFLOP"), (10**8, "GFLOP"), (9 * 10**7, "MFLOP"), (10**16, "PFLOP")]
)
def test_one_unit_serves_all_arms(run_of, flops, unit):
    assert unit_of(study([run_of("cot", 1, [1], flops), run_of("majority", 64, [1], 64 * flops)], {})).name == unit


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (None, "-"),
        (Factor(3.2, 1.4, 7.9, True), "3.20x (1.40 to 7.90)"),
        (Factor(3.2, None, 7.9, True), "3.20x (up to 7.90)"),
        (Factor(None, 4.0, None, True), "cannot tell (from 4)"),
        (Factor(None, None, 0.9, False), "not reached (up to 0.90)"),
        (Factor(None, None, None, False), "not reached (anything)"),
    ],
)
def test_a_factor_says_what_is_not_known(factor, text):
    assert _factor(factor) == text


def test_names_are_harmless_and_not_endless(run_of):
    found = sheets(study([run_of("cot", 1, [1], 10, policy=HOSTILE), run_of("majority", 4, [1], 10, policy=HOSTILE)], {}))
    cells = {row[0] for sheet in found for row in sheet.rows}
    [name] = cells
    assert len(name) == LONGEST and "\x1b" not in name and "\u202e" not in name and name.startswith('a|<b>"\ufffd[31m')


@pytest.mark.parametrize("width", [60, 100, 200])
def test_a_terminal_shows_every_cell_whatever_its_width(line_up, width):
    screen = Console(file=io.StringIO(), width=width)
    sheet = named(line_up)["gain"]
    show(sheet, screen)
    text = screen.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert all(part in text for row in sheet.rows for cell in row for part in cell.split())


def test_markup_in_a_cell_is_text():
    screen = Console(file=io.StringIO(), width=80)
    show(Sheet("x", "[bold]title", "", ("[red]a", "b"), (("[/]", "[link=x]"),), 1), screen)
    assert all(words in screen.file.getvalue() for words in ("[bold]title", "[red]a", "[/]", "[link=x]"))
