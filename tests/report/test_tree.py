import io

from rich.console import Console

from tts_engine.ledger import Ledger
from tts_engine.report.solution import solution
from tts_engine.report.tree import in_order, tree
from tts_engine.results import SearchResult
from tts_engine.search import BeamSearch
from tts_engine.tasks.problems import Problem
from tts_engine.testing import play_method, scripted_policy, scripted_prm

METHOD = BeamSearch(n=2, width=2)


def searched(first="[red]a\x1b[2J", answer="7"):
    """Two rounds of a scripted beam search; the better branch ends in "c."."""
    policy = scripted_policy({"": f"{first} b", first: "c. d."})
    prm = scripted_prm({first: 0.75, "b": 0.5, f"{first}c.": 0.875, f"{first}d.": 0.25})
    branches, _ = play_method(METHOD, policy, prm)
    nodes = {step.identity: step for branch in branches for step in branch.steps}
    return SearchResult(
        problem=Problem("p", "What [b]is\x07 it?", None), method=METHOD, seed=0, answer=answer,
        aggregates={"majority": answer, "last_vote": answer}, branches=branches, answers=[answer, "8"], groups=[answer, "8"],
        nodes=list(nodes.values())[::-1], ledger=Ledger.empty(),
    )  # fmt: skip


def drawn(what):
    screen = Console(file=io.StringIO(), width=100)
    screen.print(what)
    return screen.file.getvalue()


def test_the_tree_has_every_step_once_with_its_score_and_the_chosen_path_starred():
    lines = drawn(tree(searched())).splitlines()
    assert lines[0] == "What [b]is\ufffd it?"  # markup and control characters are shown, not obeyed
    assert "* " in lines[1] and "0.750  [red]a\ufffd[2J" in lines[1]
    assert "* v 0.875  c.  [eos]" in lines[2] and "v 0.250  d.  [eos]" in lines[3] and "*" not in lines[3]
    assert len(lines) == 4


def test_steps_are_ordered_by_depth_and_draw_however_they_came():
    result = searched()
    assert [node.text for node in in_order(result.nodes)] == ["[red]a\x1b[2J", "c.", "d."]
    assert in_order(result.nodes[::-1]) == in_order(result.nodes)


def test_the_solution_shows_steps_scores_answer_and_cost():
    text = drawn(solution(searched()))
    assert "0.750  [red]a\ufffd[2J" in text and "0.875  c." in text and "d." not in text
    assert "answer: 7" in text and "majority 7, last_vote 7" in text
    assert "policy: 0 tokens generated" in text and "PRM:" not in text and "time:" in text


def test_a_search_without_an_answer_says_so():
    text = drawn(solution(searched(answer=None)))
    assert "answer: none; no branch holds one" in text and "0.875  c." in text
