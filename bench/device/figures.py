"""What is hoped for on a GPU. Imports nothing of any weight: who tells the figures may be at an end with everything else."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What is hoped for: a number to be reached, and a better one. Where `most`, smaller is better."""

    what: str
    least: float
    aim: float
    unit: str
    most: bool = False

    def verdict(self, value: float) -> str:
        def reached(bound: float) -> bool:
            return value <= bound if self.most else value >= bound

        return "aim reached" if reached(self.aim) else "reached" if reached(self.least) else "not reached"


FIGURES = {
    "sharing": Figure(what="tree attention over the sharing-blind kernel", least=2.5, aim=4.0, unit="x"),
    "blind": Figure(what="the sharing-blind kernel alone, unshared data, share of copy", least=80, aim=90, unit="%"),
    "bandwidth": Figure(what="distinct KV bytes, share of copy", least=75, aim=88, unit="%"),
    "unrelated": Figure(what="nothing shared: loss", least=5, aim=2, unit="%", most=True),
    "cascade": Figure(what="tree attention over level by level", least=1.5, aim=2.5, unit="x"),
    "reread": Figure(what="PRM scoring over full re-read, share of the token ratio", least=0.7, aim=0.9, unit=""),
    "head": Figure(what="PRM head's share of PRM time", least=1.0, aim=0.3, unit="%", most=True),
    "prefill": Figure(what="PRM prefill, share of a large product's rate", least=60, aim=75, unit="%"),
    "search": Figure(what="whole beam search over sharing-blind with PRM re-read", least=4.0, aim=8.0, unit="x"),
    "overlap": Figure(what="policy and PRM in two streams over one model at a time", least=1.05, aim=1.25, unit="x"),
    "tick": Figure(what="decode tick over its roofline floor", least=1.6, aim=1.25, unit="x", most=True),
}
