"""A search drawn as the tree of its steps."""

from rich.text import Text
from rich.tree import Tree

from ..branch import Branch
from ..results import SearchResult
from .text import harmless


def tree(result: SearchResult) -> Tree:
    """Every step drawn, under its parent, with its score; the chosen path in bold with a star, the voted leaves with a v."""
    chosen = {step.identity for step in result.chosen.steps} if result.chosen else set()
    voted = {branch.identity for branch in result.branches}
    drawn = Tree(Text(one_line(result.problem.problem)))
    places = {0: drawn}  # by identity, the prompt's is 0
    for node in in_order(result.nodes):
        assert node.parent is not None
        places[node.identity] = places[node.parent.identity].add(_label(node, node.identity in chosen, node.identity in voted))
    return drawn


def in_order(nodes: list[Branch]) -> list[Branch]:
    """Steps by depth, then by the draws that lead to them: an order that no batch and no eviction can change."""
    return sorted(nodes, key=lambda node: (node.depth, [(step.lane, step.draw) for step in node.steps]))


def one_line(text: str) -> str:
    return " ".join(harmless(text).split())


def _label(node: Branch, chosen: bool, voted: bool) -> Text:
    score = "     " if node.score is None else f"{node.score:.3f}"
    ending = f"  [{node.finish}]" if node.finish is not None else ""
    signs = ("* " if chosen else "  ") + ("v " if voted else "  ")
    return Text(f"{signs}{score}  {one_line(node.text)}{ending}", style="bold" if chosen else "")
