"""Draws on their way to a step: what those of one search have in common, what each has come to, and what a tick reads for them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from .branch import Branch, Finish
from .kv.tree import NO_NODE
from .ledger import DistinctStep, DistinctSteps, PolicyLedger, Work
from .rows import Run
from .sampling import Sampling
from .search.driver import Answer, Draw, Driver, Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a branch is cut: tokens of one step, tokens of all steps, positions the model has."""

    max_step_tokens: int
    max_tokens: int
    max_positions: int

    def step_room(self, used: int, prompt_tokens: int) -> int:
        """Tokens that the next step may have behind the prompt's and `used` others."""
        return min(self.max_step_tokens, self.max_tokens - used, self.max_positions - prompt_tokens - used)


@dataclass(slots=True, eq=False, kw_only=True)
class DrawContext:
    """What all draws of one search have in common. `drawn` is told every child as it closes. score_of: the score of a child that
    was read before anybody asked, None where it was not yet."""

    driver: Driver
    sampling: Sampling
    key: tuple[int, int]  # of the random numbers, see sampling.philox_key
    limits: Limits
    max_steps: int
    prompt_tokens: int
    ledger: PolicyLedger
    drawn: Callable[[Branch], None]
    score_of: Callable[[Branch], float | None] = lambda child: None
    nodes: dict[int, int] = field(default_factory=dict)  # by identity: the step's node, all above it computed; or a stale handle
    steps: DistinctSteps = field(init=False)  # those that closed
    work: Work = field(default_factory=Work)  # done since it was last counted
    ventured: dict[int, int] = field(default_factory=dict)  # by identity of a step: FLOPs behind it for guesses alone
    sampling_number: int = 0  # the policy's, once it was asked

    def __post_init__(self) -> None:
        self.steps = DistinctSteps(self.prompt_tokens)


@dataclass(slots=True, eq=False)
class OpenDraw:
    """One draw on its way to its `place` in an answer: waiting, or decoding under a lease. A row that was preempted waits with the
    tokens it has and resumes behind them.

    A guess is a draw that nobody has asked for, but may when `round` is over; it is asked for in its turn, or dropped.
    """

    context: DrawContext
    answer: Answer | None
    place: int
    draw: Draw
    round: Round | None = None  # of a guess
    tokens: list[int] = field(default_factory=list)
    lease: int = NO_NODE
    path_start: int = 0  # tokens on the path before the step
    first: int = 0  # tokens it had when its lease began
    follows: bool = False  # its lease is another's too, who answers for what is computed under it
    skipped: int = 0  # leading tokens under its lease that were computed on another's account
    spared: int = 0  # leading tokens that never were computed on its own account
    seat: int = 0  # among the rows of the ticks that are under way
    computed: int = 0  # leading tokens that were computed in earlier leases
    text: str = ""  # once its step is whole
    finish: Finish | None = None
    flops: int = 0  # of a guess that decodes no longer


@dataclass(slots=True, eq=False)
class Missing:
    """What a tick reads of one step's tokens, on the account of the first search that needs it."""

    context: DrawContext
    step: DistinctStep
    start: int
    kept: bool  # its keys and values are there: what is missing is the last token's hidden state


@dataclass(slots=True, eq=False)
class Batch:
    """What one tick reads for the rows it admits."""

    leases: int | None = None  # of all rows; counted once one is to begin
    seating: DrawContext | None = None  # that of the newest row
    runs: list[Run] = field(default_factory=list)
    num_tokens: int = 0  # of all runs
    run_of: dict[int, int] = field(default_factory=dict)  # node -> its run
    sources: list[int] = field(default_factory=list)  # for each row admitted: the run that its next token is drawn behind
    missing: dict[int, Missing] = field(default_factory=dict)  # run -> its account, where it is a node's
    first: dict[int, OpenDraw] = field(default_factory=dict)  # run -> the first draw behind it
    # The first draw of each search that begins behind a node with such tokens of its step, and the run that it draws behind.
    begun: dict[tuple[DrawContext, int, tuple[int, ...]], tuple[OpenDraw, int]] = field(default_factory=dict)

    @property
    def can_go_on(self) -> bool:
        """Whether every row that it is read for has one token of it to itself, as rows that decode have."""
        return len(set(self.sources)) == len(self.sources) == len(self.runs) == self.num_tokens

    def add(self, run: Run) -> int:
        """Its number."""
        self.runs.append(run)
        self.num_tokens += len(run.tokens)
        return len(self.runs) - 1
