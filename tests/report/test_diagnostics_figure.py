"""A PRM's diagnostics drawn."""

from dataclasses import replace

import pytest

from tts_engine.report import curves
from tts_engine.report.diagnostics import Subject
from tts_engine.report.diagnostics_figure import diagnostics_figure
from tts_engine.report.prm_quality import Judged, Solution, Step, diagnose

pytest.importorskip("matplotlib")

SUBJECT = Subject(source="$run$_<b>", form="run", policy="small", prm="good", task="t, test", method="best_of_n n=2",
                  length_unit="policy tokens", labels="the file", failed=0)  # fmt: skip


def problem(right, wrong):
    """Two draws of two steps each; the second is wrong from its last step on."""
    steps = (Step(right, 4, True), Step(right, 9, True), Step(right, 4, True), Step(wrong, 9, False))
    return Judged(steps, (Solution((right, right), -1, "1", True), Solution((right, wrong), 1, "2", False)))


@pytest.fixture
def axes_of(monkeypatch):
    """Diagnostics -> the axes of their figure."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(curves, "DPI", 30)
    found, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *where, **how: (found.append(self), save(self, *where, **how)))

    def draw(diagnostics):
        figure = diagnostics_figure(diagnostics, "diagnostics-1")
        assert figure.png[1:4] == b"PNG" and figure.title == "good on $run$_<b>"
        return found[-1].axes

    return draw


def points(axes, label):
    [line] = [line for line in axes.get_lines() if line.get_label() == label]
    return [tuple(round(value, 6) for value in point) for point in line.get_xydata().tolist()]


def test_points_are_the_figures_of_the_record(axes_of):
    reliability, length, choice = axes_of(diagnose([problem(0.9, 0.15) for _ in range(9)], SUBJECT))
    assert points(reliability, "steps") == [(15, 0), (90, 100)]
    assert points(length, "good steps") == [(4, 100), (9, 50)] and points(length, "mean score") == [(4, 90), (9, 52.5)]
    assert points(choice, "last_max") == [(1, 50), (2, 100)] and points(choice, "majority")[0] == (1, 50)
    assert choice.get_xticks().tolist() == [1, 2]


def test_what_the_data_cannot_give_has_no_axes(axes_of):
    unlabelled = [Judged((Step(0.4, 3, None), Step(0.6, 4, None)), ())] * 3
    [length] = axes_of(diagnose(unlabelled, replace(SUBJECT, policy=None, method=None)))
    assert [line.get_label() for line in length.get_lines()] == ["mean score"]


def test_legends_lie_below_their_axes(axes_of):
    for axes in axes_of(diagnose([problem(0.9, 0.1 + place / 100) for place in range(9)], SUBJECT)):
        assert axes.get_legend().get_window_extent().y1 < axes.xaxis.label.get_window_extent().y0
