"""What a search cost: what was computed, how much of it an ideal executor would have had to, and what the work would have been
without sharing.

The ideal executor follows from the tree of what was drawn and scored, and from nothing else. Draws of one search that came out with
the same tokens behind the same step are one step to it, and it computes every token of a model once:

- The policy reads the prompt once. Of a step of L tokens it computes those behind which something is drawn: all but the last one,
  and the last one too where another step was drawn behind it. Behind each there is one row of logits, from which all draws that
  begin there take their token; the prompt's is at its last token. Of steps that begin alike, what they have in common is computed
  once, their last tokens left out.
- The PRM reads its opening once, and every token of each scored step as its family writes it, markers included; at the step's read
  position one hidden state goes through the rest of the last layer and through the head.

A token that goes through the layers pays for their matrices, of the last layer only its key and value, and 4 H D for each token it
sees, itself among them, in every layer but the last. A hidden state that is read pays for the rest of the last layer.

What was executed is that, less what the search found computed by others (an earlier search with the same prompt), and more by what
was wasted. Every FLOP of the waste has one reason:

- padding: rows that were computed beside those asked for, so that a kernel has the shape it wants. Those of a forward are on the
  account of its last row.
- duplicates: a step, or the beginning of one, that was drawn again, later than the first. The method asks for that draw, yet no
  number comes of it that was not there.
- rereading: a token whose keys and values are there goes through the layers again, because its hidden state is wanted and was not
  kept: the last token of a step behind which more is drawn later; the PRM's marker behind a step equal to one read before.
- recompute: keys and values were evicted, or given up by a draw that was preempted.
- speculation: a step was begun, on rows that would have stood idle, before it was asked for, and then it was not.

Example: a prompt of 5 tokens, steps of 4 and 3 tokens behind one another. Tokens: 5 + 4 + 2; rows of logits: 1 + 4 + 2. Had the
first step been drawn twice at different times, 3 tokens and 3 rows of logits would be duplicates.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from os.path import commonprefix
from typing import Any

PETA = 1e15
LATER = {"later": True}  # of fields that records of earlier versions lack

# --- the steps of one search, as one model is given them --------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Work:
    """`tokens` through the layers, with so many (query, key) pairs a layer, and `reads` of them, with their pairs, through what the
    last layer and the head do for a hidden state that is read."""

    tokens: int = 0
    pairs: int = 0
    reads: int = 0
    read_pairs: int = 0

    def add(self, tokens: int, pairs: int, reads: int, read_pairs: int) -> None:
        self.tokens += tokens
        self.pairs += pairs
        self.reads += reads
        self.read_pairs += read_pairs

    def add_through(self, start: int, count: int) -> None:
        """So many tokens behind `start` others, nothing drawn behind them."""
        self.tokens += count
        self.pairs += pairs(start, count)

    def add_drawn(self, start: int, count: int) -> None:
        """So many tokens behind `start` others, with something drawn behind each."""
        seen = pairs(start, count)
        self.add(count, seen, count, seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Tokens whose keys and values a model held for the branches of one round, all of them at the end of their newest step, in the
    round where these were most: `distinct`, each token once; `logical`, had every branch its whole path to itself."""

    distinct: int
    logical: int


@dataclass(slots=True, eq=False, kw_only=True)
class DistinctStep:
    """All draws of one search that have the same tokens behind the same step; or the prompt."""

    parent: "DistinctStep | None"
    start: int  # tokens on the path before it
    tokens: int
    depth: int
    draws: int = 0
    expanded: bool = False  # something was drawn behind it
    computed: int = 0  # leading tokens that the search has computed so far, whatever became of their keys and values

    @property
    def written(self) -> int:
        """Tokens of it that were computed while it was drawn: all but the last."""
        return self.tokens - 1


class DistinctSteps:
    """The steps of one search, those with equal tokens behind one parent being one. Found by identity, the prompt by 0."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt = DistinctStep(parent=None, start=0, tokens=prompt_tokens, depth=0)
        self._of = {0: self.prompt}
        self._behind: dict[tuple[int, tuple[int, ...]], DistinctStep] = {}
        self._drawn = Work()  # by all draws, until their steps were whole

    def __getitem__(self, identity: int) -> DistinctStep:
        return self._of[identity]

    def __contains__(self, identity: int) -> bool:
        return identity in self._of

    def __iter__(self) -> Iterator[DistinctStep]:
        """All but the prompt, parents first."""
        return iter(self._behind.values())

    def add(self, identity: int, parent: int, tokens: Sequence[int], draws: int = 1, spared: int = 0) -> DistinctStep:
        """Note a draw, or so many, behind the step that has the identity `parent`; spared: so many of its leading tokens were
        computed for draws beside it, which began alike."""
        above = self._of[parent]
        above.expanded = True
        step = self._behind.get((id(above), key := tuple(tokens)))
        if step is None:
            step = DistinctStep(parent=above, start=above.start + above.tokens, tokens=len(key), depth=above.depth + 1)
            self._behind[id(above), key] = step
        step.draws += draws
        if draws and spared < step.written:
            self._drawn.add_drawn(step.start + spared, step.written - spared)
        self._of[identity] = step
        return step

    def blocks(self, block_size: int) -> int:
        """Blocks of so many tokens that prompt and steps take, where none is evicted."""
        return sum(-(-step.tokens // block_size) for step in (self.prompt, *self))

    def drawn(self) -> tuple[Work, Work]:
        """What an ideal policy computes, and what the policy computed again in drawing what it had drawn before."""
        prompt, once, again = self.prompt.tokens, Work(), replace(self._drawn)
        behind: dict[int, list[tuple[int, ...]]] = {}
        for parent, tokens in self._behind:
            behind.setdefault(parent, []).append(tokens[:-1])
        starts = {id(step.parent): step.start for step in self}
        for parent, steps in behind.items():
            before: tuple[int, ...] = ()
            for tokens in sorted(steps):  # what two have in common, their neighbours in this order have too
                known = len(commonprefix((before, tokens)))
                once.add_drawn(starts[parent] + known, len(tokens) - known)
                before = tokens
        again.add(-once.tokens, -once.pairs, -once.reads, -once.read_pairs)
        once.add(prompt, pairs(0, prompt), 1, prompt)
        for step in self:
            once.add_drawn(step.start + step.written, step.expanded)
        return once, again

    def read_once(self, read_at: int) -> Work:
        """What an ideal PRM computes; read_at: the read position from the end of a step, as in PRMSpec."""
        opening = self.prompt.tokens
        total = Work(tokens=opening, pairs=pairs(0, opening))
        for step in self:
            total.add(step.tokens, pairs(step.start, step.tokens), 1, step.start + step.tokens + read_at + 1)
        return total

    def widest_round(self) -> Held:
        """What the search held. Round r is the r-th step of every path.

        Blocks that a step does not fill, and steps of pruned branches that were not evicted yet, are left out.
        """
        rounds: dict[int, list[DistinctStep]] = {}
        for step in self:
            rounds.setdefault(step.depth, []).append(step)
        held = [Held(distinct=self.prompt.tokens, logical=self.prompt.tokens)]
        for steps in rounds.values():
            paths = {id(self.prompt): self.prompt}
            for step in steps:
                above: DistinctStep | None = step
                while above is not None and id(above) not in paths:
                    paths[id(above)] = above
                    above = above.parent
            logical = sum(step.draws * (step.start + step.tokens) for step in steps)
            held.append(Held(distinct=sum(step.tokens for step in paths.values()), logical=logical))
        return max(held, key=lambda one: one.distinct)


def pairs(start: int, count: int) -> int:
    """(query, key) pairs of `count` causal tokens behind `start` others: each sees all before it and itself."""
    return count * start + count * (count + 1) // 2


# --- what it cost -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class ModelLedger:
    """One model's part. FLOPs count multiply and add as two; norms, softmax and sampling are left out as everyone does."""

    tokens_computed: int = 0  # tokens that went through the layers, recomputed ones each time
    tokens_recomputed: int = 0  # of these, tokens whose KV had been there before and was evicted
    linear_flops: int = 0
    attention_flops: int = 0
    head_flops: int = 0  # logits where a token was drawn; the PRM's head where a score was read
    # How much of that, and of the padding, was waste, by reason; and what the ideal executor computes. See above.
    padding_flops: int = field(default=0, metadata=LATER)  # not among the three
    duplicate_flops: int = field(default=0, metadata=LATER)
    rereading_flops: int = field(default=0, metadata=LATER)
    recompute_flops: int = field(default=0, metadata=LATER)
    speculation_flops: int = field(default=0, metadata=LATER)
    ideal_flops: int = field(default=0, metadata=LATER)
    # Of idle steps, so that there was room: what was evicted between two counts is on the account of the second.
    blocks_evicted: int = field(default=0, metadata=LATER)
    # Keys and values in the search's widest round, see Held; of several searches added up.
    kv_distinct_bytes: int = field(default=0, metadata=LATER)
    kv_logical_bytes: int = field(default=0, metadata=LATER)

    @property
    def flops(self) -> int:
        """All that were executed."""
        return self.linear_flops + self.attention_flops + self.head_flops + self.padding_flops

    @property
    def wasted_flops(self) -> dict[str, int]:
        """By reason. With the useful ones they are all that were executed."""
        return {
            "padding": self.padding_flops,
            "duplicates": self.duplicate_flops,
            "rereading": self.rereading_flops,
            "recompute": self.recompute_flops,
            "speculation": self.speculation_flops,
        }

    @property
    def useful_flops(self) -> int:
        """Those executed that the ideal executor would have too."""
        return self.flops - sum(self.wasted_flops.values())

    @property
    def asked_flops(self) -> int:
        """What the ideal executor computes. It follows from what was drawn and scored alone, so it is the cost by which searches
        are compared that were not executed alike; in a record of an earlier version, which has no count of it, those executed."""
        return self.ideal_flops or self.flops

    @property
    def found_flops(self) -> int:
        """Those of the ideal executor that the search was spared: other searches had computed as much for it."""
        return self.ideal_flops - self.useful_flops

    def hold(self, held: Held, token_bytes: int) -> None:
        """Count keys and values that were held, token_bytes a token."""
        self.kv_distinct_bytes, self.kv_logical_bytes = held.distinct * token_bytes, held.logical * token_bytes


@dataclass(slots=True, kw_only=True)
class PolicyLedger(ModelLedger):
    tokens_generated: int = 0  # tokens drawn, whether their branch was kept or not
    tokens_unshared: int = 0  # prompt and steps of every trajectory, each prefilled and decoded on its own
    tokens_accepted: int = field(default=0, metadata=LATER)  # of those drawn, on branches that are voted on, a shared step once
    preemptions: int = field(default=0, metadata=LATER)  # draws that gave up their blocks and went on later
    tokens_adopted: int = field(default=0, metadata=LATER)  # of those drawn, before they were asked for
    tokens_wasted: int = field(default=0, metadata=LATER)  # beside those drawn: before they were asked for, and they never were

    @property
    def hit_rate(self) -> float | None:
        """Of the tokens drawn before they were asked for, the share that then was; None where there were none."""
        ahead = self.tokens_adopted + self.tokens_wasted
        return self.tokens_adopted / ahead if ahead else None


@dataclass(slots=True, kw_only=True)
class PRMLedger(ModelLedger):
    steps_scored: int = 0
    tokens_reread: int = 0  # what reading each scored step's whole path anew would have computed


@dataclass(slots=True, kw_only=True)
class Phases:
    """Seconds of the engine by what they went into. Searches that run side by side share a turn of the engine equally, so over all
    of them they add up to the time that passed; only what is one search's own, its grading, is that one's alone."""

    policy: float = 0.0  # its forwards and draws
    prm: float = 0.0  # its forwards
    grading: float = 0.0  # answers found, grouped, and held against the known one
    rest: float = 0.0  # the programs of searches, prompts, records

    def add(self, other: "Phases", times: int = 1) -> None:
        for phase in fields(self):
            setattr(self, phase.name, getattr(self, phase.name) + times * getattr(other, phase.name))


class Stopwatch:
    """Times the turns of an engine. `shared` is what a search that ran from the first on would have taken by now."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.shared = Phases()
        self._clock, self._mark = clock, clock()

    def lap(self) -> float:
        """Seconds since the last one."""
        now = self._clock()
        passed, self._mark = now - self._mark, now
        return passed

    def share(self, phase: str, searches: int) -> None:
        """A lap that went into one phase of so many searches."""
        setattr(self.shared, phase, getattr(self.shared, phase) + self.lap() / max(1, searches))

    def since(self, before: Phases) -> Phases:
        """What was added to `shared` from `before` on."""
        passed = replace(self.shared)
        passed.add(before, -1)
        return passed


@dataclass(slots=True, kw_only=True)
class Ledger:
    """The cost of one search, policy and PRM apart."""

    policy: PolicyLedger
    prm: PRMLedger
    seconds: float = 0.0  # from the search's first request to its last answer, other searches running beside it
    phases: Phases = field(default_factory=Phases)

    @classmethod
    def empty(cls) -> "Ledger":
        return cls(policy=PolicyLedger(), prm=PRMLedger())

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Ledger":
        """Back from `as_dict`. What records of earlier versions lack is 0; KeyError for what every one has."""
        return cls(
            policy=PolicyLedger(**_known(PolicyLedger, record["policy"])),
            prm=PRMLedger(**_known(PRMLedger, record["prm"])),
            seconds=record["seconds"],
            phases=Phases(**record.get("phases", {})),
        )

    @property
    def flops(self) -> int:
        """Policy and PRM together."""
        return self.policy.flops + self.prm.flops

    @property
    def asked_flops(self) -> int:
        """Policy and PRM together."""
        return self.policy.asked_flops + self.prm.asked_flops

    @property
    def useful(self) -> float | None:
        """The share of the FLOPs executed that were useful; None where that was not counted, in a record of an earlier version."""
        if not self.policy.ideal_flops:
            return None
        return (self.policy.useful_flops + self.prm.useful_flops) / self.flops

    @property
    def wasted(self) -> dict[str, float]:
        """The other shares, by reason."""
        policy, prm = self.policy.wasted_flops, self.prm.wasted_flops
        return {reason: (policy[reason] + prm[reason]) / self.flops if self.flops else 0.0 for reason in policy}

    def add(self, other: "Ledger") -> None:
        """Count `other` in; seconds add up too, so they are machine time only where nothing ran side by side.

        One whose useful FLOPs were not counted leaves those of the sum unknown.
        """
        unknown = any(one.flops and one.useful is None for one in (self, other))
        for part in ("policy", "prm"):
            mine, theirs = getattr(self, part), getattr(other, part)
            for each in fields(mine):
                setattr(mine, each.name, getattr(mine, each.name) + getattr(theirs, each.name))
        if unknown:
            self.policy.ideal_flops = 0
        self.seconds += other.seconds
        self.phases.add(other.phases)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, totals included, for JSON."""
        record = asdict(self)
        for part in ("policy", "prm"):
            record[part] |= {"flops": getattr(self, part).flops, "useful_flops": getattr(self, part).useful_flops}
        record["policy"]["hit_rate"] = self.policy.hit_rate
        return record


def _known(part: type[ModelLedger], record: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: record.get(each.name, 0) if each.metadata else record[each.name] for each in fields(part)}
