"""What a sweep would cost, before any of it is run: FLOPs, bytes of keys and values, and hours of a GPU, from config.json alone.

FLOPs are the ledger's own, `Ledger.asked_flops`, of trees in which no two steps begin alike and every solution has
`solution_tokens` in steps of `step_tokens`, the methods' own limits and the models' positions kept to. Survivors have different
parents, so keys and values are as many as they can be. A PRM is taken to read the policy's tokens and STEP_MARKERS more a step, and
its prompt to be as long; its own head is left out. Rebase counts as a beam search of width 4, what stops by itself as if it did
not, and auto as its dearest method.

Hours are a roofline's, of no machine that anything was measured on: products take their FLOPs over peak_flops, and drawing reads
all weights and the keys and values of the trees under way once a forward, as many problems side by side as rows and memory allow;
each over `utilisation`. Whichever is slower counts, and the two models take turns. What one GPU cannot hold, weights with the keys
and values of one problem, is taken to be spread over the fewest that can, at no loss; hours are then those of all of them together.
The engine itself runs on one.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import ceil
from pathlib import Path
from typing import Any

from ..config import DTYPES
from ..embedded import NAMES, model_path
from ..errors import EngineError, TaskError
from ..ledger import Held, Work, pairs
from ..models.linear import activations
from ..models.spec import DecoderSpec
from ..models.weights import SOURCES, resolve_checkpoint, weight_bytes
from ..search import Method
from ..strategy.auto import table_for
from ..strategy.choose import load_strategy
from ..tasks.problems import find_task
from .plan import REPLAYED, RESCORED, SEARCHED, Cell, plan
from .recipe import AutoEntry, Estimate, Recipe

STEP_MARKERS = 2  # tokens that a PRM's family writes beside those of a step, about
WIDTH = 4  # of a method that has none and keeps some of its branches
FULL = 0.9  # of a GPU's memory that weights, keys and values may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one cell. FLOPs are of all its problems, as it would cost alone; bytes of keys and values, of both models, are of one
    problem at its widest: held, each token once, and had every branch its whole path to itself. hours: of gpus H200, for what is
    executed: nothing where it is replayed, only the reading where it is rescored."""

    name: str
    policy: str
    prm: str | None
    method: str
    n: int
    made: str
    problems: int
    policy_flops: int
    prm_flops: int
    kv_bytes: int
    kv_logical_bytes: int
    weight_bytes: int
    gpus: int
    hours: float


@dataclass(frozen=True, slots=True)
class Estimated:
    """The cells whose models are known, and a sentence for each thing that could not be had."""

    costs: list[Cost]
    missing: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {"cells": [asdict(cost) for cost in self.costs], "missing": self.missing}


def estimate(recipe: Recipe, configs: Path | None = None) -> Estimated:
    """What each cell of a recipe would cost. configs: a directory in which a hub id's config.json is found, as
    OWNER/NAME/config.json, before the hub is asked. Raises EngineError where it is not known how many problems there are."""
    missing = dict[str, None]()
    specs = dict[str, DecoderSpec]()
    for name in (*recipe.policies, *recipe.prms):
        try:
            specs[name] = SOURCES["random"](resolve_checkpoint(_place(name, configs), "random")).spec
        except EngineError as error:
            missing[str(error)] = None
    try:
        problems = len(find_task(recipe.task).load(recipe.split))
    except (TaskError, EngineError) as error:
        if recipe.estimate.problems is None:
            raise
        missing[f"{error}; taken to have {recipe.estimate.problems} problems"] = None
        problems = recipe.estimate.problems
    problems = min(problems, recipe.limit or problems)
    costs = []
    for cell in plan(recipe):
        if not {cell.policy, cell.prm} <= {*specs, None}:
            continue
        try:
            methods = _methods(cell, recipe, configs)
        except EngineError as error:
            missing[f"{cell.name}: {error}"] = None
            continue
        prm = specs[cell.prm] if cell.prm is not None else None
        each = [_cost(cell, method, specs[cell.policy], prm, problems, recipe) for method in methods]
        costs.append(max(each, key=lambda cost: cost.policy_flops + cost.prm_flops))
    return Estimated(costs, list(missing))


def _place(name: str, configs: Path | None) -> str | Path:
    if name in NAMES:
        return model_path(name)
    beside = configs / name if configs is not None else None
    return beside if beside is not None and (beside / "config.json").is_file() else name


def _methods(cell: Cell, recipe: Recipe, configs: Path | None) -> list[Method]:
    """The cell's method; of auto, all that it may choose."""
    if not isinstance(cell.method, AutoEntry):
        return [cell.method]
    prm = _place(cell.prm, configs) if cell.prm is not None else None
    task = find_task(recipe.task).name
    table = table_for(load_strategy(cell.method.strategy), policy=_place(cell.policy, configs), prm=prm, task=task, load="random")
    return [table.method(bin, cell.method.n) for bin in table.bins.names]


# --- the tree that a method grows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """`rounds` rounds of n steps of `step` tokens behind a prompt; of each round but the last `kept` are continued."""

    prompt: int
    step: int
    rounds: int
    n: int
    kept: int

    def drawn(self) -> Work:
        """What an ideal policy computes of it, see DistinctSteps.drawn."""
        work = Work(tokens=self.prompt, pairs=pairs(0, self.prompt), reads=1, read_pairs=self.prompt)
        for place in range(self.rounds):
            start = self.prompt + place * self.step
            expanded = self.kept if place + 1 < self.rounds else 0
            for steps, count in ((expanded, self.step), (self.n - expanded, self.step - 1)):
                seen = steps * pairs(start, count)
                work.add(steps * count, seen, steps * count, seen)
        return work

    def read(self) -> Work:
        """What an ideal PRM computes of it, reading the last token of each step; see DistinctSteps.read_once."""
        work = Work(tokens=self.prompt, pairs=pairs(0, self.prompt))
        for place in range(self.rounds):
            start = self.prompt + place * self.step
            work.add(self.n * self.step, self.n * pairs(start, self.step), self.n, self.n * (start + self.step))
        return work

    def held(self, rounds: int | None = None) -> Held:
        """Tokens of the branches of a round, the last one or that behind so many: see DistinctSteps.widest_round."""
        rounds = self.rounds if rounds is None else rounds
        distinct = self.prompt + ((rounds - 1) * self.kept + self.n) * self.step
        return Held(distinct=distinct, logical=self.n * (self.prompt + rounds * self.step))

    def mean_held(self) -> float:
        """Distinct tokens on average over the rounds."""
        return sum(self.held(rounds + 1).distinct for rounds in range(self.rounds)) / self.rounds


def shape(method: Method, told: Estimate, *, max_step_tokens: int, max_tokens: int) -> Shape:
    """max_tokens: of a solution."""
    solution = min(told.solution_tokens, max_tokens)
    step = min(told.step_tokens, max_step_tokens, solution)
    independent = not method.uses_prm or method.name in ("best_of_n", "adaptive")
    kept = method.n if independent else max(1, method.n // getattr(method, "width", WIDTH))
    return Shape(told.prompt_tokens, step, max(1, min(ceil(solution / step), method.max_steps)), method.n, kept)


def flops_of(spec: DecoderSpec, work: Work, head_flops: int) -> int:
    """As ModelRunner counts them."""
    linear = (spec.flops_per_token - spec.flops_per_read) * work.tokens + spec.flops_per_read * work.reads
    pair = spec.attention_flops_per_pair // spec.num_layers
    return linear + pair * ((spec.num_layers - 1) * work.pairs + work.read_pairs) + head_flops * work.reads


def _cost(cell: Cell, method: Method, policy: DecoderSpec, prm: DecoderSpec | None, problems: int, recipe: Recipe) -> Cost:
    config, told = recipe.config, recipe.estimate
    dtype = DTYPES[config.dtype]
    prm = prm if method.uses_prm else None
    most = min(config.max_tokens, policy.max_positions - told.prompt_tokens)
    if prm is not None:
        markers = STEP_MARKERS * ceil(told.solution_tokens / told.step_tokens)
        most = min(most, prm.max_positions - told.prompt_tokens - markers)
    drawn = shape(method, told, max_step_tokens=config.max_step_tokens, max_tokens=max(1, most))
    read = Shape(drawn.prompt, drawn.step + STEP_MARKERS, drawn.rounds, drawn.n, drawn.kept)
    policy_flops = problems * flops_of(policy, drawn.drawn(), policy.lm_head_flops)
    prm_flops = problems * flops_of(prm, read.read(), 0) if prm is not None else 0

    def held(of: Callable[[Shape], float]) -> float:
        return sum(spec.kv_bytes_per_token(activations(dtype)) * of(tree) for spec, tree in ((policy, drawn), (prm, read)) if spec)

    kv_bytes, logical = int(held(lambda tree: tree.held().distinct)), int(held(lambda tree: tree.held().logical))
    weights = sum(weight_bytes(spec, dtype) for spec in (policy, prm) if spec is not None)
    gpus = max(1, ceil((weights + kv_bytes) / (FULL * told.memory_bytes)))
    side_by_side = max(1, min(problems, config.max_rows // method.n, int((gpus * FULL * told.memory_bytes - weights) // kv_bytes)))
    forwards = problems * drawn.rounds * drawn.step / side_by_side
    own_kv = policy.kv_bytes_per_token(activations(dtype)) * drawn.mean_held() * side_by_side
    arithmetic, memory = told.utilisation * told.peak_flops, told.utilisation * told.bandwidth
    drawing = max(policy_flops / arithmetic, forwards * (weight_bytes(policy, dtype) + own_kv) / memory)
    seconds = {REPLAYED: 0.0, RESCORED: prm_flops / arithmetic, SEARCHED: drawing + prm_flops / arithmetic}[cell.made]
    return Cost(
        name=cell.name, policy=cell.policy, prm=cell.prm, method="pilot" if cell.pilot else cell.method.name, n=cell.method.n,
        made=cell.made, problems=problems, policy_flops=policy_flops, prm_flops=prm_flops, kv_bytes=kv_bytes,
        kv_logical_bytes=logical, weight_bytes=weights, gpus=gpus, hours=seconds / 3600,
    )  # fmt: skip


def assumptions(told: Estimate) -> str:
    """In a sentence, what the estimate hangs on."""
    own = ", ".join(f"{each.name} {getattr(told, each.name):g}" for each in fields(told) if getattr(told, each.name) is not None)
    return f"estimated, not measured: {own}; see tts_engine/sweep/estimate.py"
