"""What the command line takes: its verbs, and how each of their options is read. Parsing alone, nothing is run here."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from .embedded import BLOCK_SIZE, MODELS, NAMES
from .kv.budget import read_bytes
from .report.diagnostics import THRESHOLD
from .report.versions import package_version
from .search import METHODS, PRESETS
from .search.rules import Grouping
from .tasks.problems import A_FILE, TASKS

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
POLICY, PRM, METHOD, BUDGET = "policy-s", "prm-good", "beam", 16
NO_PRM, AUTO = "none", "auto"
LONGEST, ENDING = 800, 200  # characters of a sentence that are shown, the last ones among them: what it quotes may be endless
MOST_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {one_line(message)} (see {self.prog} --help)\n")


def number(read: Callable[[str], float], holds: Callable[[float], bool], words: str) -> Callable[[str], float]:
    """An argparse type: `words` say what it must be."""

    def parse(text: str) -> float:
        try:
            value = read(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return parse


def listed(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An argparse type: one value, or several between commas."""
    return lambda text: tuple(read(part) for part in text.split(","))


integer = number(int, lambda value: value == value, "a whole number")
whole = number(int, lambda value: value >= 1, "a whole number of at least 1")
threads = number(int, lambda value: 1 <= value <= MOST_THREADS, f"a whole number of at least 1 and at most {MOST_THREADS}")
not_negative = number(int, lambda value: value >= 0, "a whole number of at least 0")
share = number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
fraction = number(float, lambda value: 0 <= value <= 1, "a number of at least 0 and at most 1")
real = number(float, lambda value: value == value, "a number")
size = number(read_bytes, lambda value: value >= 1, "a number of bytes such as 512M or 4G")
seconds = number(float, lambda value: 0 < value < math.inf, "a number of seconds above 0")
memory = number(read_bytes, lambda value: 1 <= value < 1 << 60, "a size of memory such as 80GB, 141GiB or a number of bytes")

# Settings of EngineConfig: name, how it is read (None: a switch), help. The defaults are EngineConfig's; a test compares.
ENGINE_OPTIONS: list[tuple[str, Callable[[str], Any] | None, str]] = [
    ("load", str, "weights, or random: made up, from a config.json and a tokenizer alone (default weights)"),
    (
        "dtype",
        str,
        "float32, bfloat16, or 8-bit products: int8 on a CPU, fp8 on a GPU (default: float32 on a CPU, bfloat16 on a GPU)",
    ),
    ("device", str, "cpu or cuda (default cpu)"),
    ("backend", str, "attention: native, per_branch, reference; on a GPU triton_tree, triton_blind (default: native, triton_tree)"),
    ("memory", str, "for weights, keys and values of both models, and working memory: 20GB, or a share of the device: 80%%"),
    ("kv_bytes", size, "instead, for keys and values of both models: 512M, 4G (default 512M)"),
    ("block_size", whole, f"tokens a KV block (default 16; {BLOCK_SIZE} for the models that ship)"),
    ("max_rows", whole, "draws decoded side by side (default 512)"),
    ("max_step_tokens", whole, "tokens after which a step is cut (default 2048)"),
    ("max_tokens", whole, "tokens after which a solution is cut (default 8192)"),
    ("top_k", not_negative, "draw from the k likeliest tokens; 0 for all (default 0)"),
    ("top_p", share, "draw from the likeliest tokens of this joint probability (default 1.0)"),
    ("min_p", fraction, "draw from tokens at least this fraction as likely as the likeliest (default 0.0)"),
    ("system", str, "system message, '' for none (default: the problem is put as the policy's family is used to)"),
    (
        "steps",
        str,
        "what closes a step: blank-line, header (## Step), numbered (Step 1:), or so many tokens (default blank-line)",
    ),
    ("prm_family", str, "qwen2.5-math-prm, math-shepherd, rlhflow, skywork or value-head, where the PRM's files do not say"),
    ("deterministic", None, "a problem's tokens never depend on what runs beside it; slower"),
    ("speculate", None, "rows that would stand idle draw the likeliest next steps ahead; the results are the same"),
    ("timeout", seconds, "seconds after which a problem is given up (default: none is)"),
]
# Those of them that decide how a PRM reads.
READING_OPTIONS = ("load", "dtype", "device", "backend", "memory", "kv_bytes", "block_size", "prm_family", "deterministic")
GROUPINGS = get_args(Grouping)
# Settings of the method that stops by itself: name, how it is read, help.
ADAPTIVE_OPTIONS: list[tuple[str, Callable[[str], Any], str]] = [
    ("vote", str, "what must not change: majority, or by a PRM last_vote, last_max, min_vote, ... (default majority)"),
    ("bound", real, "how likely the answer may be another than that of n draws; 0: never (default 0)"),
    ("batch", integer, "draws at a time (default 4)"),
    ("budget", str, "for all problems together, spent where a vote may still change: 50000tokens, 2e9flops, 60s (default: none)"),
]

# What a bench sets beside its models and engine: the flag, how one of its values is read, help. The steps' lengths are its own.
BENCH_DEPTH = 4  # the models that ship have 512 positions
BENCH_OPTIONS: list[tuple[str, Callable[[str], Any], str]] = [
    ("method", str, f"{', '.join(METHODS)} (default {METHOD})"),
    ("n", integer, f"candidate steps a round, or whole solutions (default {BUDGET}; cot has none)"),
    ("width", integer, "draws for each kept branch, for beam and dvts (default 4)"),
    ("rules", str, f"{', '.join(PRESETS)}, as documented (default paper)"),
    ("depth", integer, f"steps of every solution (default {BENCH_DEPTH})"),
    ("step_tokens", whole, "tokens of a step on average, drawn from half to one and a half times as many (default 50)"),
    ("prompt_tokens", whole, "tokens of a prompt, the chat around the problem among them (default 150)"),
    ("problems", whole, "problems searched side by side (default 4)"),
]
NOT_FOR_BENCH = ("steps", "max_step_tokens", "max_tokens", "system", "timeout")
BENCH_FIGURES = """
Rates are of whole searches, by the median repeat: what the other model takes is in the time. Policy tokens are those drawn, PRM
tokens those that went through its layers. FLOPs are those executed, as the ledger counts them, and tokens/PFLOP the tokens drawn
for 10^15 of them. Useful: the share of them that had to be, each distinct step computed once by each model; files say what the
rest was. MFU: the products with weights that both models executed, as a share of what one large matrix product of that dtype,
timed before, would have done in that time. MBU: weights and keys and values, read once a forward, as a share of what copying
memory would have moved in that time; more than 100 where they stay in caches. Joules: of one repeat, where a GPU's driver counts
them. KV: keys and values of both models, of all problems, in the round in which the branches held most, each at the end of its
newest step; distinct: every token once, as they are held; logical: had every branch its whole path to itself. Peak RSS: memory
that the process has had at most so far.
"""


Run = Callable[[argparse.Namespace], int]


def make_parser(runs: Mapping[str, Run]) -> Parser:
    """runs: what is done for each verb."""
    engine, method, json_last = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    models = engine.add_argument_group("models", f"{', '.join(NAMES)} ship with the package; else a directory or a hub id")
    models.add_argument("--policy", metavar="P", default=POLICY, help="who writes the steps (default %(default)s)")
    models.add_argument("--prm", metavar="Q", help=f"who scores them (default {PRM} beside a policy that ships)")
    add_engine_options(engine.add_argument_group("engine"), [name for name, *_ in ENGINE_OPTIONS])

    group = method.add_argument_group("method")
    text = f"{', '.join(METHODS)}, or {AUTO}: what --strategy has for the problem (default {METHOD})"
    group.add_argument("--method", choices=[*METHODS, AUTO], default=METHOD, help=text, metavar="M")
    group.add_argument("--n", type=integer, help=f"candidate steps a round, or whole solutions (default {BUDGET}; cot has none)")
    group.add_argument("--width", type=integer, help="draws for each kept branch, for beam and dvts (default 4)")
    group.add_argument("--rules", choices=PRESETS, metavar="R", help=f"{', '.join(PRESETS)}, as documented (default paper)")
    group.add_argument("--temperature", type=real, help="of the draws (default: the rules', 0.7 or 0.8; cot is greedy)")
    group.add_argument("--max-steps", type=integer, metavar="STEPS", help="steps after which a solution is cut (default 40)")
    for name, read, text in ADAPTIVE_OPTIONS:
        group.add_argument(f"--{name}", type=read, metavar=name.upper(), help=f"for adaptive: {text}")
    group.add_argument("--seed", type=integer, default=0, help="of all random numbers (default 0)")
    group.add_argument("--strategy", metavar="FILE", help=f"for --method {AUTO}: as fit wrote it, or paper_table")
    json_last.add_argument("--json", action="store_true", help="end with one JSON line on standard output")

    parser = Parser(prog="tts-engine", description="A policy writes steps, a reward model scores them, a search keeps the best.")
    parser.add_argument("--version", action="version", version=f"tts-engine {package_version('tts-engine') or '(not installed)'}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, text: str, *parents: argparse.ArgumentParser,
             under: Any = verbs) -> argparse.ArgumentParser:  # fmt: skip
        made: argparse.ArgumentParser = under.add_parser(name, help=text, description=text, parents=parents)
        made.set_defaults(run=runs[made.prog.removeprefix(f"{parser.prog} ")])
        return made

    solve = verb("solve", "search one problem and show the chosen solution", engine, method, json_last)
    solve.add_argument("problem", metavar="PROBLEM", help="the problem's text")
    solve.add_argument("--tree", action="store_true", help="draw every step of the search")

    evaluate = verb("eval", "search a task's problems, keep every step, report accuracy", engine, method, json_last)
    evaluate.add_argument("--task", required=True, metavar="T", help=f"{', '.join(TASKS)}, or {A_FILE}")
    evaluate.add_argument("--split", default="test", help="of the task (default %(default)s)")
    evaluate.add_argument("--limit", type=whole, metavar="K", help="only the first K problems (default: all)")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="made, or continued where it stopped")
    text = (
        f"for --method {AUTO}: a majority or best_of_n run of the same problems with another seed, whose share of right answers "
        "says how hard they are; by default that is predicted"
    )
    evaluate.add_argument("--difficulty", type=Path, metavar="DIR2", help=text)

    fit = verb("fit", "choose the best method for every difficulty and budget, from runs on calibration problems", json_last)
    fit.add_argument("run_directories", type=Path, nargs="+", metavar="DIR", help="runs to choose among, as eval wrote them")
    fit.add_argument("--pilot", type=Path, action="append", required=True, metavar="DIR", help="a majority or best_of_n run of the "
                     "same problems with another seed, which says how hard they are; one a policy, or policy and PRM")  # fmt: skip
    fit.add_argument("--out", type=Path, required=True, metavar="FILE", help="the strategy to write")
    fit.add_argument("--bins", choices=("absolute", "quantile"), default="absolute", help="of difficulty (default %(default)s)")
    fit.add_argument("--edges", type=listed(share), metavar="P,P", help="pass rates that part absolute bins (default 0.5,0.1)")
    fit.add_argument("--quantiles", type=whole, default=5, metavar="K", help="quantile bins (default %(default)s)")
    fit.add_argument("--draws", type=not_negative, default=4, metavar="K", help="pilot draws of every search that predict how hard "
                     "its problem is; 0: it will be told (default %(default)s)")  # fmt: skip
    fit.add_argument(
        "--budgets", type=listed(whole), default=(), metavar="N,N", help="to choose for (default: every n of the runs)"
    )

    sweep = verb("sweep", "policies x PRMs x methods x n as a recipe has them, in one directory of runs", json_last)
    sweep.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file; tts_engine/sweep/recipe.py tells what is in one")
    sweep.add_argument("-o", "--out", type=Path, metavar="DIR", help="made, or continued where it stopped (default runs/RECIPE)")
    sweep.add_argument("--dry-run", action="store_true", help="only tell what each cell would cost, from the models' config.json")
    text = "beside --dry-run: where configs of hub ids lie, as OWNER/NAME/config.json (default: the hub)"
    sweep.add_argument("--configs", type=Path, metavar="DIR", help=text)
    sweep.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: torch's own choice)")

    score = verb("score", "choose anew among the stored trees of a run, without a model", json_last)
    score.add_argument("run_directory", type=Path, metavar="DIR", help="as eval or rescore wrote it")
    score.add_argument("--grouping", choices=GROUPINGS, metavar="G", help=f"{' or '.join(GROUPINGS)} (default: the run's rules')")

    rescore = verb("rescore", "let another PRM read the stored trees of a run; what is not given here is as the run "
                   "was made", json_last)  # fmt: skip
    rescore.add_argument("run_directory", type=Path, metavar="DIR", help="as eval wrote it; it is not changed")
    rescore.add_argument("--prm", metavar="Q", required=True, help=f"{', '.join(NAMES)} ship; else a directory or a hub id")
    rescore.add_argument("--out", type=Path, metavar="DIR2", help="made, or continued where it stopped (default DIR-by-Q)")
    add_engine_options(rescore.add_argument_group("engine"), READING_OPTIONS)

    diagnose = verb("diagnose", "tell how far a PRM's scores of steps can be trusted", json_last)
    text = "a run as eval or rescore wrote it, or solutions with marked first errors: JSON or JSONL in the form of ProcessBench"
    diagnose.add_argument("source", type=Path, metavar="RUN|FILE", help=text)
    text = "who reads the steps now: a name, a directory or a hub id (default: a run's own scores are told of)"
    diagnose.add_argument("--prm", metavar="Q", help=text)
    text = "score from which on a step is called good (default %(default)s)"
    diagnose.add_argument("--threshold", type=fraction, default=THRESHOLD, metavar="S", help=text)
    text = "for the figures (default: diagnostics.json in a run whose own scores are told of, else none)"
    diagnose.add_argument("-o", "--out", type=Path, metavar="FILE", help=text)
    add_engine_options(diagnose.add_argument_group("engine, beside --prm"), READING_OPTIONS)

    report = verb("report", "compare runs of the same problems: tables, PNGs and one HTML page that holds them all",
                  json_last)  # fmt: skip
    report.add_argument("directories", type=Path, nargs="+", metavar="RUN", help="as eval, rescore or sweep wrote it")
    report.add_argument("-o", "--out", type=Path, metavar="DIR", help="for report.html and PNGs (default runs/report-TIME)")
    text = (
        "a majority or best_of_n run of the same problems with another seed, whose share of right answers says how hard they are; "
    )
    report.add_argument("--difficulty", type=Path, action="append", default=[], metavar="DIR2", help=f"{text}one a policy")
    text = "as diagnose wrote it; those in the runs are shown anyway"
    report.add_argument("--diagnostics", type=Path, action="append", default=[], metavar="FILE", help=text)

    convert = verb("convert", "write pytorch_model.bin, in one file or shards, anew as safetensors", json_last)
    convert.add_argument("source", type=Path, metavar="SRC", help="a checkpoint's directory; it is not changed")
    convert.add_argument("destination", type=Path, metavar="DST", help="the directory to make")

    info = verb("info", "versions, CPU, and sizes of models, read from their config.json alone", json_last)
    info.add_argument("--policy", metavar="P", help="a model by name, directory or hub id (default: all that ship)")
    info.add_argument("--prm", metavar="Q", help="another; a config.json will do for either")
    info.add_argument("--memory", type=memory, metavar="BYTES", help="tell whether both fit, and how many KV tokens: 80GB, 141GiB")

    bench = verb("bench", "time searches that are the same work for everyone; every combination of the values given",
                 json_last)  # fmt: skip
    bench.epilog = BENCH_FIGURES
    models = bench.add_argument_group("models, several between commas", f"{', '.join(NAMES)}, a directory or a hub id")
    text = f"who writes the steps (default {POLICY})"
    models.add_argument("--policy", type=listed(str), metavar="P", default=(POLICY,), help=text)
    text = f"who scores them, {NO_PRM} for nobody (default {PRM} beside a policy that ships)"
    models.add_argument("--prm", type=listed(str), metavar="Q", help=text)
    group = bench.add_argument_group("search, several values between commas")
    for name, read, text in BENCH_OPTIONS:
        group.add_argument(f"--{name.replace('_', '-')}", type=listed(read), metavar=name.split("_")[-1].upper(), help=text)
    group.add_argument("--seed", type=integer, default=0, help="of all random numbers (default 0)")
    of_engine = [name for name, *_ in ENGINE_OPTIONS if name not in NOT_FOR_BENCH]
    add_engine_options(bench.add_argument_group("engine, several values between commas"), of_engine, several=True)
    bench.add_argument("--repeats", type=whole, default=3, metavar="N", help="of every case, behind one that warms up (default 3)")
    bench.add_argument("-o", "--out", type=Path, metavar="FILE", help="for the table: FILE.md, or in full FILE.csv or FILE.jsonl")

    demo = verb("demo", "a small policy with search against a large one without", json_last)
    demo.add_argument("--problems", type=whole, default=100, metavar="N", help="test problems (default %(default)s)")
    demo.add_argument("--out", type=Path, metavar="DIR", help="for the runs and the plot (default runs/demo-TIME)")
    demo.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: torch's own choice)")

    embedded = verbs.add_parser("embedded", help="remake or re-measure the models that ship")
    parts = embedded.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)
    train = verb("train", "remake every model that is missing, from nothing", under=parts)
    train.add_argument("--out", type=Path, default=MODELS, metavar="DIR", help="for the models (default: the package's own folder)")
    train.add_argument("--work", type=Path, default=Path("build/embedded"), metavar="DIR", help="for logs (default %(default)s)")
    check = verb("check", "measure the models anew and compare with what ships", json_last, under=parts)
    check.add_argument("--problems", type=whole, metavar="N", help="calibration problems (default: all)")
    return parser


def add_engine_options(group: Any, names: Sequence[str], *, several: bool = False) -> None:
    """Those of ENGINE_OPTIONS that are named; with `several`, each takes values between commas."""
    for name, read, text in ENGINE_OPTIONS:
        if name in names:
            value = name.split("_")[-1].upper()
            how: dict[str, Any] = {"action": "store_true"}
            if read is not None:
                how = {"type": listed(read) if several else read, "metavar": value}
            group.add_argument(f"--{name.replace('_', '-')}", default=None, help=text, **how)
    group.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: torch's own choice)")


def one_line(text: str) -> str:
    """A sentence as it is shown: on one line, the middle of an endless one left out."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - ENDING]} ... {text[-ENDING:]}"


def is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
