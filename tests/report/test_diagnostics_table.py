"""The diagnostics of a PRM as a terminal shows them."""

import io
from dataclasses import replace

from rich.console import Console

from tts_engine.report.diagnostics import Subject
from tts_engine.report.diagnostics_table import diagnostics_table, headline
from tts_engine.report.prm_quality import Judged, Solution, Step, diagnose

SUBJECT = Subject(source="run\x1b[31m", form="run", policy="small", prm="good", task="t, test", method="best_of_n n=2",
                  length_unit="policy tokens", labels="the file", failed=1)  # fmt: skip


def problem(right, wrong):
    """Two draws of two steps each; the second is wrong from its last step on."""
    steps = (Step(right, 4, True), Step(right, 9, True), Step(right, 4, True), Step(wrong, 9, False))
    return Judged(steps, (Solution((right, right), -1, "1", True), Solution((right, wrong), 1, "2", False)))


def shown(found, width=120):
    screen = Console(file=io.StringIO(), width=width)
    screen.print(diagnostics_table(found))
    return screen.file.getvalue()


def test_every_section_is_shown_with_its_figures():
    found = diagnose([problem(0.9, 0.1 + place / 100) for place in range(9)], SUBJECT)
    out = shown(found)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    about, counts = headline(found).split(": ")
    assert about == "good on run\ufffd[31m (t, test, by small, best_of_n n=2)" and counts == (
        "9 problems, 18 solutions, 36 steps (27 good, 9 first errors); 1 problems could not be searched or read and are left out"
    )
    assert out.startswith("good on run\ufffd[31m (t, test")
    for line in ("AUC 100.0 (100-100) 9 problems", "F1 at 0.5 100.0 (100-100) 9 problems", "found, of erroneous solutions 100.0 "
                 "(100-100) 9 solutions", "called rightly at 0.9 100.0 chosen on these very data: optimistic", "0.2-0.3 0 - -",
                 "0.9-1 27 90.0 100.0 (100-100)", "4 18 90.0 (90-90) 100.0 (100-100)", "last score: AUC 100.0 (100-100) 9 problems",
                 "min_max 50.0 100.0 +50.0 (+50.0 to +50.0) +50.0 (+50.0 to +50.0) 90.0 (90-90)",
                 "choosing: pass@1 50.0 (50-50) %, pass@2 100.0 (100-100) %", "confidence: scores too low: over-criticism",
                 "over-optimisation: no rule is seen to get worse"):  # fmt: skip
        assert line in lines, line
    assert "\x1b" not in out


def test_what_is_missing_is_said():
    found = diagnose(
        [Judged((Step(0.4, 3, None), Step(0.6, 4, None)), ())] * 3, replace(SUBJECT, failed=0, policy=None, method=None)
    )
    out = shown(found)
    assert "good on run\ufffd[31m (t, test): 3 problems, 0 solutions, 6 steps\n" in out
    for line in ("first error: not known, nobody says where a solution goes wrong", "choice: not known, nobody says which answers",
                 "step scores: not known, nobody says which steps are good", "rank correlation with the score +1.00"):  # fmt: skip
        assert line in out, line
    assert "F1" not in out and "None" not in out and "nan" not in out
