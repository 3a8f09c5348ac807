"""How fast searches are on this machine: work that is the same for everyone, and what it took.

A case is a method over made-up problems: prompts of a stated number of tokens, steps of a drawn, seeded number of tokens whatever
they say (steps.DrawnLengths), no solution ending before its last step. What the weights say decides nothing but which branches a
PRM keeps, and with it which of the drawn lengths the kept paths have: so `load="random"` measures what a trained model would.
"""

import itertools
import random
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import DTYPES, EngineConfig, kv_room
from .engine import Engine, make_policy
from .errors import EngineError, OutOfBlocks
from .kv.tree import blocks_needed
from .ledger import Ledger
from .models.linear import FP8, activations
from .models.tokenizer import chat_template, encode_prompt, load_tokenizer
from .models.weights import SOURCES, Checkpoint, resolve_checkpoint
from .prm.families import FAMILIES, recognise, refuse_as_policy
from .report.energy import joules
from .results import SearchResult
from .search import METHODS, PRESETS, Method, make_method
from .steps import DrawnLengths, check_mode
from .tasks.problems import Problem
from .tasks.prompts import messages

REPEATS = 3
MOST_PROBLEMS = 1 << 16
SHORTEST_TEXT = 8  # tokens of a problem: with fewer, two could be the same
OWN_LENGTHS = ("steps", "max_step_tokens", "max_tokens")  # settings of an engine that a case makes itself
PETA = 1e15

# --- a case -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One search to be timed: `problems` side by side, each of a prompt of `prompt_tokens`, in `method.max_steps` steps of
    `step_tokens` on average, the longest half as long again.

    policy, prm: directories or hub ids. config: the engine's; what it says of the lengths of steps is not used. The prompt's tokens
    are all there are, the chat's around the problem and a system message (none unless config.system says so) among them.
    """

    policy: str | Path
    prm: str | Path | None
    method: Method
    config: EngineConfig = field(default_factory=lambda: EngineConfig(system=""))
    problems: int = 4
    prompt_tokens: int = 150
    step_tokens: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_mode(str(self.step_tokens))
        if not 1 <= self.problems <= MOST_PROBLEMS:
            raise EngineError(f"problems={self.problems} must be at least 1 and at most {MOST_PROBLEMS}")
        if self.method.uses_prm and self.prm is None:
            raise EngineError(f"{self.method.name} needs a PRM, and none is given")

    @property
    def longest_step(self) -> int:
        return self.step_tokens + self.step_tokens // 2

    @property
    def longest_solution(self) -> int:
        """In tokens."""
        return self.longest_step * self.method.max_steps

    @property
    def engine_config(self) -> EngineConfig:
        """The engine's, with steps of this case's length, none of which is cut."""
        return replace(
            self.config, steps=str(self.step_tokens), max_step_tokens=self.longest_step, max_tokens=self.longest_solution
        )

    def settings(self) -> dict[str, Any]:
        """All there is to set, as plain values."""
        config = {name: value for name, value in asdict(self.config).items() if name not in OWN_LENGTHS}
        config |= {"backend": self.config.attention}
        rules = next((name for name, preset in PRESETS.items() if preset == self.method.rules), "own")
        models = {"policy": _name(self.policy), "prm": _name(self.prm) if self.prm is not None else None}
        method = {"method": self.method.name, "n": self.method.n, "width": getattr(self.method, "width", None), "rules": rules}
        lengths = {"problems": self.problems, "prompt_tokens": self.prompt_tokens, "depth": self.method.max_steps,
                   "step_tokens": self.step_tokens, "seed": self.seed}  # fmt: skip
        return models | method | lengths | config


def _name(model: str | Path) -> str:
    return Path(model).name or str(model)


def cross(
    models: Iterable[tuple[str | Path, str | Path | None]], *, of_engine: Mapping[str, Sequence[Any]], methods: Sequence[str],
    of_case: Mapping[str, Sequence[Any]], of_method: Mapping[str, Sequence[Any]],
) -> list[Case]:  # fmt: skip
    """Every combination, each once; what stands first here, and first in a mapping, varies slowest.

    models: pairs of a policy and a PRM, which is left out where a method reads none. of_engine, of_case, of_method: settings of
    EngineConfig, of Case and of make_method, each with its values; a method does without those that only others of `methods` have.
    Raises EngineError for a combination that makes no sense.
    """
    fields_of = {name: {field.name for field in fields(METHODS[name])} if name in METHODS else set() for name in methods}
    known = set().union(*fields_of.values())
    made: dict[Case, None] = {}
    for (policy, prm), engine, name in itertools.product(models, _combined({"system": [""], **of_engine}), methods):
        settings = {key: values for key, values in of_method.items() if key in fields_of[name] or key not in known}
        for case, chosen in itertools.product(_combined(of_case), _combined(settings)):
            method = make_method(name, **chosen)
            read = prm if method.uses_prm else None
            made[Case(policy=policy, prm=read, method=method, config=EngineConfig(**engine), **case)] = None
    return list(made)


def _combined(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


# --- its problems -----------------------------------------------------------------------------------------------------------


def make_problems(case: Case, tokenizer: Any) -> list[Problem]:
    """Problems whose prompts are `case.prompt_tokens` long to the policy, all different, the same for the same seed.

    Their text is one that no tokenizer joins; where one does all the same, prompts are nearly as long.
    Raises EngineError where the chat around a problem leaves no room for one.
    """
    template = chat_template(tokenizer)
    texts: dict[str, None] = {}
    for attempt in itertools.count():
        drawn = random.Random(f"{case.seed}/{attempt}")
        text = DrawnLengths(1, 1).text([drawn.randrange(260) for _ in range(case.prompt_tokens)])
        system, user = messages(text, template, case.config.system)
        around = len(encode_prompt(tokenizer, user, system)) - case.prompt_tokens
        if case.prompt_tokens - around < SHORTEST_TEXT:
            raise EngineError(f"a prompt of {case.prompt_tokens} tokens has no room for a problem: the policy's chat takes "
                              f"{around} and a problem {SHORTEST_TEXT}")  # fmt: skip
        texts[text[: case.prompt_tokens - around]] = None
        if len(texts) == case.problems:
            return [Problem(id=f"bench-{i}", problem=text, answer=None) for i, text in enumerate(texts)]
    raise AssertionError("there is always another text")


def check(cases: Iterable[Case]) -> None:
    """Raise EngineError for the first case that could not run to its end, before any weights are read."""
    tokenizer = cache(load_tokenizer)
    for case in cases:
        config, steps = case.config, case.method.max_steps
        policy = SOURCES[config.load](resolve_checkpoint(case.policy, config.load))
        refuse_as_policy(policy.config, policy.tensor_names, str(case.policy))
        readers = [(policy, case.prompt_tokens, case.longest_solution)]  # tokens before the first step, and of all steps
        _refuse_unless_placed(case, *readers[0])
        [problem, *_] = make_problems(case, tokenizer(policy.directory))
        if case.prm is not None:
            prm = SOURCES[config.load](resolve_checkpoint(case.prm, config.load))
            family = FAMILIES[recognise(prm.config, prm.tensor_names, config.prm_family)]
            spec = family.bind(tokenizer(prm.directory))
            markers = len(spec.step("", False)) * steps
            readers.append((prm, len(spec.opening(problem.problem)), case.longest_solution + markers))
            _refuse_unless_placed(case, *readers[1])
        kept = activations(DTYPES[config.dtype])
        token_bytes = sum(reader.spec.kv_bytes_per_token(kept) for reader, *_ in readers)
        room = kv_room(config, [reader.spec for reader, *_ in readers])
        blocks = room // token_bytes // config.block_size
        for _, before, tokens in readers:
            # A branch takes most blocks where all steps but one are a single token: what the engine asks for, too.
            need = sum(blocks_needed(count, config.block_size) for count in (before, tokens - steps + 1)) + steps - 1
            if need > blocks:
                raise OutOfBlocks(f"one branch may need {need} KV blocks of {config.block_size} tokens in each model and "
                                  f"kv_bytes={room} holds {blocks}")  # fmt: skip


def _refuse_unless_placed(case: Case, model: Checkpoint, before: int, tokens: int) -> None:
    positions = model.spec.max_positions
    if before + tokens > positions:
        raise EngineError(f"{before} tokens of prompt and {case.method.max_steps} steps of up to {case.longest_step} may come to "
                          f"{before + tokens} in {_name(model.directory)}, which has {positions} positions: make the prompt or the "
                          "steps shorter, or fewer")  # fmt: skip


# --- what it took -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A case and what it took: `ledger` of all its problems once, `seconds` of each repeat.

    ceiling: FLOP/s of matrix products in the case's dtype, see `gemm_ceiling`; copy_ceiling: bytes/s, see there. bytes_read: what
    one repeat had to read, see `least_bytes`. joules: of one repeat; None where nobody counts them. peak_rss: bytes of memory that
    the process has had at most, up to now.
    """

    case: Case
    ledger: Ledger
    seconds: tuple[float, ...]
    ceiling: float
    copy_ceiling: float
    bytes_read: int
    joules: float | None
    peak_rss: int

    @property
    def median(self) -> float:
        """Seconds; all rates are by this repeat."""
        return median(self.seconds)

    @property
    def problems_per_s(self) -> float:
        return self.case.problems / self.median

    @property
    def policy_tokens_per_s(self) -> float:
        """Tokens drawn, whether their branch was kept or not; what the PRM takes is in the time."""
        return self.ledger.policy.tokens_generated / self.median

    @property
    def prm_tokens_per_s(self) -> float:
        """Tokens that went through the PRM's layers; what the policy takes is in the time."""
        return self.ledger.prm.tokens_computed / self.median

    @property
    def mfu(self) -> float:
        """Products with weights that both models executed, logits and scores among them, as a share of what the ceiling would
        have done in that time. Attention is not in it."""
        linear = sum(part.linear_flops + part.head_flops for part in (self.ledger.policy, self.ledger.prm))
        return linear / self.median / self.ceiling

    @property
    def mbu(self) -> float:
        """The bytes that both models' forwards had to read, as a share of what copying memory would have moved in that time. More
        than 1 where weights stay in a processor's caches from one forward to the next."""
        return self.bytes_read / self.median / self.copy_ceiling

    @property
    def kv_distinct(self) -> int:
        """Bytes of keys and values, of all problems and both models together, see ledger.Held; so is kv_logical."""
        return self.ledger.policy.kv_distinct_bytes + self.ledger.prm.kv_distinct_bytes

    @property
    def kv_logical(self) -> int:
        return self.ledger.policy.kv_logical_bytes + self.ledger.prm.kv_logical_bytes

    @property
    def tokens_per_pflop(self) -> float:
        """Tokens drawn for every 10^15 FLOPs executed, by both models and for everything the ledger counts."""
        return self.ledger.policy.tokens_generated / (self.ledger.flops / PETA)

    def as_dict(self) -> dict[str, Any]:
        """Flat and plain, for JSON and CSV."""
        policy, prm, useful = self.ledger.policy, self.ledger.prm, self.ledger.useful
        phases = asdict(self.ledger.phases)
        wasted = {f"wasted_{reason}": share for reason, share in self.ledger.wasted.items()}
        return self.case.settings() | {
            "threads": torch.get_num_threads(),
            "repeats": len(self.seconds),
            "seconds": self.median,
            "seconds_min": min(self.seconds),
            "seconds_max": max(self.seconds),
            "problems_per_s": self.problems_per_s,
            **{f"seconds_{phase}": seconds for phase, seconds in phases.items()},
            "policy_tokens": policy.tokens_generated,
            "accepted_tokens": policy.tokens_accepted,
            "policy_tokens_per_s": self.policy_tokens_per_s,
            "policy_flops": policy.flops,
            "prm_tokens": prm.tokens_computed,
            "prm_tokens_per_s": self.prm_tokens_per_s,
            "prm_flops": prm.flops,
            "recomputed_tokens": policy.tokens_recomputed + prm.tokens_recomputed,
            "useful": useful,
            **wasted,
            "speculation_hit_rate": policy.hit_rate,
            "mfu": self.mfu,
            "gemm_flops_per_s": self.ceiling,
            "gemm_side": gemm_side(self.case.config.device),
            "mbu": self.mbu,
            "copy_bytes_per_s": self.copy_ceiling,
            "joules": self.joules,
            "tokens_per_pflop": self.tokens_per_pflop,
            "kv_distinct_bytes": self.kv_distinct,
            "kv_logical_bytes": self.kv_logical,
            "peak_rss_bytes": self.peak_rss,
        }


def run_case(engine: Engine, case: Case, ceiling: float, copy_ceiling: float, *, repeats: int = REPEATS,
             clock: Callable[[], float] = time.perf_counter) -> Measured:  # fmt: skip
    """Search the case's problems once to warm up and `repeats` times to be timed, with no KV left from the time before.

    engine: with the case's models and settings; of its own, only what it says of the lengths of steps may differ.
    """
    rule = DrawnLengths(case.step_tokens, engine.policy.runner.decoder.spec.vocab_size)
    config = case.engine_config
    policy = make_policy(config, engine.policy.runner, rule)
    fitted = Engine(config, policy, engine.scorer, engine.tokenizer, engine.grader)
    problems = make_problems(case, engine.tokenizer)
    seconds, results, meters = [], list[SearchResult](), list[tuple[int, float | None]]()  # what was read, and taken, before each
    for _ in range(1 + repeats):
        fitted.forget()
        meters.append((least_bytes(engine), joules(config.device)))
        began = clock()
        results = fitted.search(problems, case.method, seed=case.seed)
        seconds.append(clock() - began)
    ledger = Ledger.empty()
    for result in results:
        ledger.add(result.ledger)
    (read, before), after = meters[1], joules(config.device)
    return Measured(
        case=case,
        ledger=ledger,
        seconds=tuple(seconds[1:]),
        ceiling=ceiling,
        copy_ceiling=copy_ceiling,
        bytes_read=(least_bytes(engine) - read) // repeats,
        joules=None if before is None or after is None else (after - before) / repeats,
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def least_bytes(engine: Engine) -> int:
    """Bytes that the forwards of both models have had to read since they were loaded, at least: in each the matrices once, and once
    the blocks of keys and values on the paths of all its rows.

    Norms, embedded rows, activations, logits, and what a kernel reads twice are left out.
    """
    total = 0
    for runner, logits in zip(engine.runners, (True, False), strict=False):
        spec, dtype = runner.decoder.spec, DTYPES[engine.config.dtype]
        matrices = dtype.itemsize * spec.num_layers * spec.layer_weights
        head = (dtype if dtype == torch.int8 else activations(dtype)).itemsize * spec.vocab_size * spec.hidden_size * logits
        total += runner.forwards * (matrices + head) + runner.blocks_read * runner.block_bytes
    return total


def measure(cases: Sequence[Case], *, repeats: int = REPEATS) -> Iterator[Measured]:
    """Every case, checked before the first one runs; those with the same models and engine one after the other, so that these are
    loaded once. The ceiling of a dtype is measured before its first case."""
    if repeats < 1:
        raise EngineError(f"repeats={repeats} must be at least 1")
    check(cases)
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.policy, case.prm, case.config), []).append(case)
    ceilings = cache(gemm_ceiling), cache(copy_ceiling)
    return itertools.chain.from_iterable(_measure(group, *ceilings, repeats) for group in groups.values())


def _measure(group: list[Case], products: Callable[[str, str], float], copies: Callable[[str], float],
             repeats: int) -> Iterator[Measured]:  # fmt: skip
    first = group[0]
    limits = products(first.config.dtype, first.config.device), copies(first.config.device)
    with Engine.from_pretrained(first.policy, first.prm, **asdict(first.engine_config)) as engine:
        for case in group:
            yield run_case(engine, case, *limits, repeats=repeats)


# --- the ceiling ------------------------------------------------------------------------------------------------------------

SIDE = {"cpu": 2048, "cuda": 8192}  # of the three sides of the product, by kind of device
COPIED = {"cpu": 1 << 27, "cuda": 1 << 31}  # bytes: more than a processor's share of caches holds
ROUNDS = 7


def _bytes(x: Tensor) -> Tensor:
    return (20 * x).clamp(-127, 127).to(torch.int8)


# By dtype of an engine: float32 rows and a weight -> what multiplies them in that dtype, and nothing else.
GEMMS: dict[str, Callable[[Tensor, Tensor], Callable[[], Tensor]]] = {
    "float32": lambda rows, weight: partial(F.linear, rows, weight),
    "bfloat16": lambda rows, weight: partial(F.linear, rows.bfloat16(), weight.bfloat16()),
    "int8": lambda rows, weight: partial(torch._int_mm, _bytes(rows), _bytes(weight).T),
    "fp8": lambda rows, weight: partial(torch._scaled_mm, rows.to(FP8), weight.to(FP8).T, scale_a=rows.new_ones(len(rows), 1),
                                        scale_b=rows.new_ones(1, len(weight)), out_dtype=torch.bfloat16, use_fast_accum=False),
}  # fmt: skip


def gemm_side(device: str) -> int:
    return SIDE[torch.device(device).type]


@torch.inference_mode()
def gemm_ceiling(dtype: str, device: str = "cpu", *, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a product of two square matrices in `dtype`."""
    side = gemm_side(device)
    product = GEMMS[dtype](*(torch.randn(side, side, device=device) for _ in range(2)))
    return 2 * side**3 / _fastest(product, device, clock)


@torch.inference_mode()
def copy_ceiling(device: str = "cpu", *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes/s that are read and written when a large piece of memory is copied."""
    source = torch.ones(COPIED[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, clock)


def _fastest(work: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of ROUNDS after one that is not counted."""
    seconds = []
    for _ in range(1 + ROUNDS):
        began = clock()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - began)
    return min(seconds[1:])
