import io

import pytest
from rich.console import Console

from tts_engine.ledger import Ledger, PolicyLedger, PRMLedger
from tts_engine.report.table import aggregate_rows, cell_of, rows, table


def record(name, correct, seconds=0.5, method="beam", n=4, **aggregates):
    ledger = Ledger(
        policy=PolicyLedger(tokens_generated=1000, linear_flops=1_500_000_000, attention_flops=500_000_000,
                            duplicate_flops=400_000_000, ideal_flops=1_600_000_000),
        prm=PRMLedger(tokens_computed=800, tokens_reread=6400, linear_flops=2_000_000_000, rereading_flops=100_000_000),
    )  # fmt: skip
    settings = {"name": method} | ({"n": n} if n else {})
    verdicts = {k: {"answer": "1", "correct": v} for k, v in aggregates.items()}
    outcome = {"id": name, "method": settings, "correct": correct, "aggregates": verdicts}
    return outcome | {"seconds": seconds, "ledger": ledger.as_dict()}


def test_a_cell_adds_up_its_records_in_order_of_their_ids():
    cell = cell_of([record("b", True), record("a", False)], "policy-s", uses_prm=True)
    assert (cell.ids, cell.correct, cell.accuracy) == (("a", "b"), (False, True), 0.5)
    assert (cell.method, cell.n, cell.label) == ("beam", 4, "beam n=4")
    assert cell.ledger.policy.tokens_generated == 2000 and cell.ledger.seconds == 1.0
    assert cell.gflop == pytest.approx(8.0) and cell.gflop_per_problem == pytest.approx(4.0)
    assert cell.correct_per_gflop == pytest.approx(1 / 8) and cell.correct_per_s == pytest.approx(1.0)
    told = cell.as_dict()
    assert told["interval_95"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
    assert (told["correct_per_pflop"], told["correct_per_s"], told["useful"]) == pytest.approx((125_000, 1, 0.875))
    assert told["wasted"] == pytest.approx({"padding": 0, "duplicates": 0.1, "rereading": 0.025, "recompute": 0, "speculation": 0})


def test_useful_flops_are_told_where_every_record_counts_them():
    old = record("a", True)
    for part in ("policy", "prm"):
        for name in ("ideal_flops", "duplicate_flops", "rereading_flops", "recompute_flops", "padding_flops"):
            del old["ledger"][part][name]
    cell = cell_of([old, record("b", True)], "policy-s", uses_prm=True)
    assert cell.gflop == pytest.approx(8.0) and cell.ledger.useful is cell.as_dict()["useful"] is None
    assert rows([cell])[1][9] == "-"


def test_a_problem_that_failed_counts_as_not_solved_and_costs_nothing():
    failed = record("c", False) | {"ledger": None}
    cell = cell_of([record("a", True), failed], "p", uses_prm=True)
    assert cell.accuracy == 0.5 and cell.gflop == pytest.approx(4.0)


def test_rows_hold_what_the_demo_promises():
    searched = cell_of([record("a", True), record("b", True)], "policy-s", uses_prm=True)
    plain = cell_of([record("a", True, method="cot", n=None)], "policy-l", uses_prm=False)
    heading, first, second = rows([searched, plain])
    assert heading == ["policy", "method", "n", "accuracy % (95 %)", "generated k tok", "PRM read k tok", "re-read k tok",
                       "policy GFLOP", "PRM GFLOP", "useful %", "correct /GFLOP", "correct /s", "time s"]  # fmt: skip
    assert first == ["policy-s", "beam", "4", "100.0 (34-100)", "2", "1.60", "12.8", "4", "4", "87.5", "0.25", "2", "1"]
    assert second == ["policy-l", "cot", "1", "100.0 (21-100)", "1", "-", "-", "2", "-", "87.5", "0.25", "2", "0.50"]


@pytest.mark.parametrize("width", [80, 100, 120, 132])
def test_the_drawn_table_shows_every_cell_on_a_narrow_page_too(width):
    """But for two figures, where there is no room for all."""
    many = [record(str(i), True, method="best_of_n", n=16) for i in range(300)]
    cells = [cell_of(many, "policy-s", uses_prm=True)]
    screen = Console(file=io.StringIO(), width=width)
    screen.print(table(cells, "title [b]", width))
    text = screen.file.getvalue()
    assert "title [b]" in text and "…" not in text
    headings, values = rows(cells)
    spared = () if width >= 120 else ("useful %", "correct /s")
    told = [value for heading, value in zip(headings, values, strict=True) if heading not in spared]
    assert len(told) == (13 if width >= 120 else 11) and max(map(len, text.splitlines())) <= width
    assert all(part in text for value in told for part in value.split())
    assert ("useful" in text) == (width >= 120)


def test_every_way_to_choose_has_its_share():
    lines = aggregate_rows([record("a", True, majority=True, last_vote=False), record("b", True, majority=True, last_vote=True)])
    assert [line.split()[:2] for line in lines] == [["majority", "100.0"], ["last_vote", "50.0"]]
