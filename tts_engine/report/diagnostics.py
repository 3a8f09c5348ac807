"""What a PRM's scores are worth: the record that diagnostics.json holds.

Every figure is over problems: what several steps or draws of one problem bring is summed first, and intervals come from resampling
problems with all that is theirs. What stands behind a path's first error is neither good nor a first error and is left out, but for
`forgiven`.
"""

from dataclasses import dataclass

SCHEMA_VERSION = 1
FILE = "diagnostics.json"
THRESHOLD = 0.5
SCORE_BINS, LENGTH_BINS = 10, 5
FEWEST = 5  # problems, below which an interval says nothing
SUBSETS = 200  # of a problem's draws, at random, that stand for all of one size


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure and its 95 % interval over the `problems` that bring anything to it. `value` is None where the data cannot give it,
    `low` and `high` where too few problems stand behind it; `why` says what was missing."""

    value: float | None
    low: float | None = None
    high: float | None = None
    problems: int
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBin:
    """Scores of at least low and below high (up to 1 in the last bin): how many, their mean, and the share that came true."""

    low: float
    high: float
    count: int
    mean_score: float | None
    true: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Scores as chances of something that is known to be true or not: of steps, to be good; of solutions, to end in a right answer.

    ece: over SCORE_BINS equally wide bins, the mean distance between mean score and share, bins weighted by their scores. Luck
    alone keeps it above 0: ece_by_luck is what a calibrated PRM stays below in 95 % of such samples. bias: mean score minus share,
    above 0 where scores are too high.
    auc: how often a true one outscores a false one, ties counting half. auc_within: the same among pairs of one problem, where it
    does not help to know which problems are hard; a search compares within a problem.
    """

    count: int
    true: int
    ece: float
    ece_by_luck: float
    bias: Estimate
    auc: Estimate
    auc_within: Estimate
    bins: tuple[ScoreBin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """Steps of low to high tokens, both included. good: of those whose label is known."""

    low: int
    high: int
    steps: int
    mean_score: Estimate
    good: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Score against step length in tokens: rank correlations (Spearman) over all steps, and over steps that are alike in being
    right, where it is a bias and not knowledge that long steps go wrong. Bins hold equally many steps as far as lengths allow."""

    correlation: Estimate
    among_good: Estimate
    among_first_errors: Estimate
    bins: tuple[LengthBin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Steps called good (score of at least the threshold) or not, against what they are.

    accuracy: the share called rightly. over_criticism: good steps that are called bad. error_neglect: first errors that are called
    good. forgiven: steps behind a first error that are called good. always: accuracy of calling everything what is commoner.
    best_accuracy at best_threshold was chosen on these very steps and is therefore optimistic.
    """

    threshold: float
    accuracy: Estimate
    over_criticism: Estimate
    error_neglect: Estimate
    forgiven: Estimate
    always: float
    best_threshold: float
    best_accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstError:
    """ProcessBench's figures: the first step below the threshold is the predicted first error, none where no step is.

    accuracy_erroneous: the share of erroneous solutions whose first error is found exactly; in the others an error is seen too
    early (early), too late (late) or not at all (never). accuracy_correct: the share of solutions without error in which none is
    seen. f1: their harmonic mean. best_f1 at best_threshold was chosen on these very solutions and is therefore optimistic.
    """

    threshold: float
    erroneous: int
    correct: int
    f1: Estimate
    accuracy_erroneous: Estimate
    accuracy_correct: Estimate
    early: Estimate
    late: Estimate
    never: Estimate
    best_threshold: float | None
    best_f1: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A rule's accuracy when it chooses among n draws; n = 1 is pass@1. promised: the mean score of what a *_max rule chose, 0
    where no draw has an answer."""

    rule: str
    n: int
    accuracy: Estimate
    promised: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Of a rule over all draws: its accuracy minus pass@1, and what the last doubling of n brought, both paired by problem. Where
    that is below 0, more draws make the choice worse: the PRM is over-optimised."""

    rule: str
    gain: Estimate
    last_doubling: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What choosing by the PRM gains. curve: for every rule and n = 1, 2, 4, .. and all draws, each n by SUBSETS random subsets of
    a problem's draws, which are as good as n draws made anew. any_right: at least one of all draws is right (pass@n)."""

    n: int
    pass_at_1: Estimate
    any_right: Estimate
    gains: tuple[Gain, ...]
    curve: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What was read, by whom: the head of the record."""

    source: str  # name of the run's directory or of the file
    form: str  # "run" or "processbench"
    policy: str | None
    prm: str
    task: str | None  # its name and split: "embedded, calibration"
    method: str | None  # "best_of_n n=16"
    length_unit: str  # whose tokens: "policy tokens" or "PRM tokens", the step's marker among the latter
    labels: str | None  # who says which steps are good, in words
    failed: int  # problems that could not be searched or read: they are in no figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """What diagnostics.json holds: dataclasses.asdict of this, read back by tts_engine.diagnose.read_diagnostics.

    A section that the data cannot give is None, or for `answers` empty, and `missing` says why by the field's name: "step_scores",
    "agreement", "first_error", "answers", "choice". Shares and scores are in [0, 1], never percent. signs: the paper's biases in
    words, those that can be told of: "length", "confidence", "over-optimisation".
    """

    schema_version: int
    subject: Subject
    problems: int
    solutions: int
    steps: int  # distinct steps with a score
    good_steps: int | None  # of them, up to the first error of their paths
    first_errors: int | None
    length: Length
    step_scores: Calibration | None  # a step's score as the chance that it is good
    agreement: Agreement | None
    first_error: FirstError | None
    answers: dict[str, Calibration]  # by aggregate (last, min, mean): a solution's score as the chance that its answer is right
    choice: Choice | None
    signs: dict[str, str]
    missing: dict[str, str]
