"""Figures: what is on which axes, told by the drawing itself; that names cannot break one."""

import struct
import sys

import pytest

from tts_engine.errors import MissingExtra
from tts_engine.report import curves
from tts_engine.report.arms import Difficulty, study

pytest.importorskip("matplotlib")

HOSTILE = "$\\frac{a}$ _<b>\x07\u202e" + "長" * 60


@pytest.fixture
def drawings(monkeypatch):
    """The figures as matplotlib has them, instead of PNGs."""
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda self, out, **how: (found.append(self), out.write(b"png")))
    return found


def lines(axes):
    """Points of each curve in the axes, by its first accuracy in percent."""
    drawn = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() not in ("None", None, "")]
    return sorted(drawn)


def test_each_figure_is_a_png_of_two_pixels_for_one(line_up):
    for figure in curves.figures(study(line_up[:3], {}))[:2]:
        assert figure.png[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", figure.png[16:24]) == pytest.approx((2 * figure.width, 2 * figure.height), abs=2)


def test_points_are_the_accuracies_and_flops_of_the_records(line_up, drawings):
    curves.accuracy_figure(study(line_up, {}), "flops")
    small, large = drawings[0].axes
    assert lines(small) == [[[1, 25]], [[4, 50], [16, 75]], [[8, 75], [32, 100]]]  # MFLOP, %
    assert lines(large) == [[[10, 50]]]
    assert small.get_xlabel() == "MFLOP a problem, policy and PRM" and small.get_xscale() == "log"
    assert (small.get_title(loc="left"), large.get_title(loc="left")) == ("small with judge", "large")


def test_budgets_are_ticks_of_their_own(line_up, drawings):
    curves.accuracy_figure(study(line_up, {}), "n")
    small = drawings[0].axes[0]
    assert lines(small) == [[[1, 25]], [[4, 50], [16, 75]], [[4, 75], [16, 100]]]
    assert small.get_xticks().tolist() == [1, 4, 16] and small.get_xlabel() == "n"


def test_the_bins_of_a_grouping_stand_side_by_side(line_up, drawings):
    policy = line_up[0].description["policy"]["sha256"]
    bins = Difficulty(policy, ("easy", "medium", "hard"), {f"p{i:03}": "easy" if i < 10 else "hard" for i in range(40)})
    found = study(line_up, {}, [bins])
    curves.difficulty_figure(found, found.groupings[1], "judge")
    easy, hard = (
        axes for axes in drawings[0].axes if axes.axison
    )  # of the small policy; nobody is medium, the large is not told of
    assert easy.get_title(loc="left") == "small, pass@1 easy (10 problems)"
    assert [points[0][1] for points in lines(easy)] == [100, 100, 100]
    assert [round(points[0][1]) for points in lines(hard)] == [0, 33, 67]


def test_all_policies_share_axes_where_they_are_compared(line_up, drawings):
    curves.size_figure(study(line_up, {}))
    [axes] = drawings[0].axes
    assert lines(axes) == [[[1, 25]], [[4, 50], [16, 75]], [[8, 75], [32, 100]], [[10, 50]]]
    [legend] = drawings[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["cot", "majority", "beam", "small", "large"]


def test_a_method_has_one_colour_everywhere(line_up, drawings):
    found = study(line_up, {})
    for over in ("n", "flops"):
        curves.accuracy_figure(found, over)
    colors = [{line.get_color() for line in drawing.axes[0].get_lines()} for drawing in drawings]
    assert colors[0] == colors[1] == {curves.COLORS[name] for name in ("cot", "majority", "beam")}


def test_no_label_lies_over_another(line_up, drawings):
    for figure in (lambda s: curves.accuracy_figure(s, "flops"), curves.size_figure):
        figure(study(line_up, {}))
    for drawing in drawings:
        drawing.draw_without_rendering()
        for axes in drawing.axes:
            ticks = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text()]
            shown = [
                box for box in ticks if axes.get_window_extent().x0 - 1 <= (box.x0 + box.x1) / 2 <= axes.get_window_extent().x1 + 1
            ]
            assert len(shown) >= 2 and all(a.x1 < b.x0 for a, b in zip(shown, shown[1:], strict=False))
        boxes = [axes.get_tightbbox() for axes in drawing.axes] + [legend.get_window_extent() for legend in drawing.legends]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("arms", [[("cot", 1)], [("beam", 4)], [("cot", 1), ("beam", 4)], [("auto", 3), ("auto", 4), ("auto", 5)]])
def test_few_arms_and_one_problem_are_drawn_without_complaint(run_of, drawings, arms, recwarn):
    runs = [run_of(method, n, [1], 10 * n, prm=None if method == "cot" else "judge") for method, n in arms]
    assert len(curves.figures(study(runs, {}))) == 3
    for drawing in drawings:
        drawing.draw_without_rendering()
    assert not recwarn.list


def test_names_are_drawn_as_text_whatever_they_hold(run_of, monkeypatch):
    monkeypatch.setattr(curves, "DPI", 20)
    runs = [
        run_of("cot", 1, [1, 0], 10, policy=HOSTILE),
        run_of("beam", 4, [1, 1], 40, policy=HOSTILE, prm="_$x", levels=("$\\a$", 2)),
    ]
    with pytest.warns(UserWarning, match="Glyph"):  # the font lacks it; a box is drawn
        assert curves.figures(study(runs, {}))


def test_a_search_that_cost_nothing_has_no_place_on_a_logarithmic_axis(run_of, drawings):
    curves.accuracy_figure(study([run_of("cot", 1, [1], 0), run_of("beam", 4, [1], 8, prm="judge")], {}), "flops")
    assert lines(drawings[0].axes[0]) == [[[8, 100]]]


def test_without_matplotlib_the_sentence_says_what_to_install(line_up, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tts-engine\[report\]'"):
        curves.figures(study(line_up, {}))
