import pytest

from tts_engine.report.text import clock, figures, harmless, percent, short


@pytest.mark.parametrize(
    ("number", "ref"),
    [(0, "0"), (7, "7"), (950, "950"), (999.6, "1.00 k"), (1234, "1.23 k"), (45_600_000, "45.6 M"), (7e9, "7 G"), (0.1234, "0.12")],
)
def test_counts_have_three_figures_and_a_unit(number, ref):
    assert short(number) == ref


@pytest.mark.parametrize(("number", "ref"), [(3, "3"), (3.14159, "3.14"), (31.4159, "31.4"), (314.159, "314"), (0.0314, "0.031")])
def test_figures_need_no_exponent(number, ref):
    assert figures(number) == ref


def test_shares_and_clocks():
    assert percent(0.54) == "54.0" and percent(0.54, (0.442, 0.634)) == "54.0 (44-63)"
    assert [clock(s) for s in (0, 7.4, 750, 11_100)] == ["0:00", "0:07", "12:30", "3:05:00"]


def test_other_peoples_text_cannot_steer_the_terminal():
    assert harmless("a\x1b[2Jb\rc\u202ed\x9be\n\tf") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffde\n\tf"
    assert harmless("x² = ½, 漢字") == "x² = ½, 漢字"
