"""Decoding timed: a tick of many branches over the least it could take, whole beam searches over an engine that shares nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tts_engine.attention import make_backend
from tts_engine.branch import Branch, root_branch
from tts_engine.draws import DrawContext, Limits
from tts_engine.engine import Engine, make_graphs
from tts_engine.ledger import PolicyLedger
from tts_engine.models.decoder import Decoder
from tts_engine.policy import Policy
from tts_engine.runner import ModelRunner
from tts_engine.sampling import Sampling, philox_key
from tts_engine.search import Driver, Method, make_method
from tts_engine.search.requests import Expand
from tts_engine.tasks.problems import Problem

from ..baselines import lockstep
from ..baselines.lockstep import Spent, Task
from ..baselines.models import text_of
from ..baselines.ours import Ours
from ..baselines.sharing_blind import RereadingPRM
from .engines import NAMES, load
from .race import copy_bandwidth, race, raced
from .setting import PAIR_PRM, Bench
from .trees import beam

OURS, BLIND = "ours", "sharing-blind, PRM re-read"
BESIDE, IN_TURN = "two streams", "one model at a time"


@dataclass
class Standing:
    """An engine whose policy has a whole grove in its KV tree, and the branches that stand on its rows."""

    engine: Engine
    nodes: list[Branch]  # the grove's, the prompt first
    branches: list[Branch]

    @classmethod
    def at(cls, bench: Bench, engine: Engine) -> "Standing":
        """What keys and values hold is drawn, not computed."""
        grove, runner, rng = beam(bench.sizes.tree), engine.policy.runner, np.random.default_rng(0)
        for table in runner.cache.tables:
            table.normal_(generator=bench.generator())
        known = runner.decoder.spec.vocab_size
        made: list[Branch] = []
        for node, (parent, length) in enumerate(zip(grove.parents, grove.lens, strict=True)):
            tokens = tuple(rng.integers(0, known, length).tolist())
            made.append(Branch(made[parent], tokens, "", node) if parent >= 0 else root_branch(tokens))
        for row in grove.rows:
            nodes = runner.hold_path([step.tokens for step in made[row].path])  # held for good
            assert nodes is not None, "the pool has no room for the tree"
            for node, step in zip(nodes, made[row].path, strict=True):
                runner.tree.set_computed(node, len(step.tokens))
        return cls(engine, made, [made[row] for row in grove.rows])

    def step(self, new: int) -> None:
        """A step of so many tokens behind every branch, all of them cut there."""

        def program():
            return (yield Expand(self.branches))

        policy, driver = self.engine.policy, Driver(program())
        limits = Limits(max_step_tokens=new, max_tokens=1 << 30, max_positions=1 << 30)
        method = make_method("majority", n=len(self.branches))
        context = drawing(driver, "tick", limits, len(self.nodes[0].tokens), method, PolicyLedger(), lambda branch: None)
        for branch in self.nodes:
            if branch.parent is not None:
                context.steps.add(branch.identity, branch.parent.identity, branch.tokens)
        for ask in driver.asks():
            policy.submit(context, ask)
        while policy.busy:
            policy.tick()
        assert [len(branch.tokens) for branch in driver.result] == [new] * len(self.branches), "a step ended on its own"


def drawing(driver: Driver, problem: str, limits: Limits, prompt_tokens: int, method: Method, ledger: PolicyLedger,
            drawn: Callable[[Branch], None]) -> DrawContext:  # fmt: skip
    """As an engine draws for one problem."""
    return DrawContext(driver=driver, sampling=Sampling(temperature=method.temperature), key=philox_key(0, problem), limits=limits,
                       max_steps=method.max_steps, prompt_tokens=prompt_tokens, ledger=ledger, drawn=drawn)  # fmt: skip


def tick(bench: Bench) -> None:
    """Seconds of one tick in the middle of a step, over what reading keys, values and weights and multiplying must take."""
    sizes = bench.sizes
    grove, directory, (short, long) = beam(sizes.tree), bench.model("policy", sizes.policy), sizes.ticks
    copy, room = copy_bandwidth(bench), 2 * (grove.num_slots + len(grove.rows) * (16 + long))
    how = {"dtype": NAMES[sizes.dtype], "steps": "1000000", "kv_bytes": room * _token_bytes(sizes.policy, sizes.dtype),
           "max_rows": len(grove.rows)}  # fmt: skip
    case = f"{len(grove.rows)} branches, {sizes.policy['num_hidden_layers']} layers"
    with load(bench, directory, **how) as engine:
        standing, policy = Standing.at(bench, engine), engine.policy
        decoder = policy.runner.decoder
        products = products_alone(bench, decoder, len(grove.rows))
        tokens = grove.distinct + len(grove.rows) * (short + long) / 2
        kv = tokens * decoder.spec.kv_bytes_per_token(decoder.dtype) / copy
        found: list[tuple[float, float]] = []  # seconds and noise
        for name, graphs in (("captured", policy.graphs), ("one by one", None)):
            if name == "captured" and graphs is None:
                bench.row(case, contender=name, missing="nothing is captured on this device")
                continue
            policy.graphs = graphs
            standing.step(short)
            times = raced(bench, {"long": lambda: standing.step(long), "short": lambda: standing.step(short)}, slow=True)
            found.append(((times.seconds["long"] - times.seconds["short"]) / (long - short), times.noise))
            bench.row(case, contender=name, ms=1e3 * found[-1][0], products_ms=1e3 * products, kv_ms=1e3 * kv, noise=times.noise,
                      rounds=times.rounds)  # fmt: skip
        bench.figure("tick", case, found[0][0] / (products + kv), noise=found[0][1])


def _token_bytes(config: dict[str, Any], dtype: torch.dtype) -> int:
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * dim * dtype.itemsize


def products_alone(bench: Bench, decoder: Decoder, rows: int) -> float:
    """Seconds of a forward's matrix products, logits too, by the decoder's own matrices and nothing else."""
    weights = decoder.weights
    layers = [linear for layer in weights.layers for linear in (*layer.heads, layer.out, layer.gate_up, layer.down)]
    matrices = layers + ([weights.lm_head] if weights.lm_head is not None else [])
    states = {width: torch.randn(rows, width, generator=bench.generator(), device=bench.device).to(decoder.dtype)
              for width in {linear.shape[1] for linear in matrices}}  # fmt: skip

    def once(_: int) -> None:
        for linear in matrices:
            linear(states[linear.shape[1]])

    with torch.inference_mode():
        return race(bench, {"products": once}).seconds["products"]


class Blind:
    """Our models, stored prefixes and captured ticks; attention that reads every branch's whole path, and a PRM that keeps nothing.

    All draws of a round, then all its scores. The scores are those given, by identity: random weights give others in every
    arithmetic, and all contenders are to keep the same branches.
    """

    def __init__(self, policy: Policy, reader: RereadingPRM) -> None:
        self.policy, self.reader = policy, reader

    def search(self, task: Task) -> Spent:
        policy, spent, driver = self.policy, Spent(), Driver(task.method.program(root_branch(task.prompt, task.problem.problem)))
        ledger = PolicyLedger()
        policy.runner.tree.evict_all()
        context = drawing(driver, task.problem.id, task.limits, len(task.prompt), task.method, ledger, spent.nodes.append)
        while not driver.done:
            asks, began = driver.asks(), time.perf_counter()
            for ask in asks:
                if ask.draws:
                    policy.submit(context, ask)
            while policy.busy:
                policy.tick()
            drew = time.perf_counter()
            for ask in asks:
                if ask.branches:
                    read = self.reader.read(ask.branches, spent)
                    scored = zip(ask.branches, read, strict=True)
                    driver.answer(ask, [lockstep.scored(branch, own, task.scores, spent) for branch, own in scored])
            spent.policy_seconds += drew - began
            spent.prm_seconds += time.perf_counter() - drew
        spent.tokens_drawn, spent.policy_tokens = ledger.tokens_generated, ledger.tokens_computed
        return spent


def search(bench: Bench) -> None:
    """Beam search, drawn lengths: the same steps for both, which is asserted before anything is told."""
    sizes = bench.sizes
    n, depth, step = sizes.search
    policy, prm = bench.model("policy", sizes.policy), bench.model("prm-pair", sizes.prm, PAIR_PRM)
    tokens = 2048 + n * depth * (2 * step + 16)
    kv_bytes = tokens * sum(_token_bytes(config, sizes.dtype) for config in (sizes.policy, sizes.prm))
    cut = {"max_step_tokens": 2 * step, "max_tokens": depth * 2 * step}
    with load(bench, policy, prm, dtype=NAMES[sizes.dtype], steps=str(step), kv_bytes=kv_bytes, max_rows=n, **cut) as engine:
        assert engine.scorer is not None
        rule, positions = engine.policy.rule, engine.policy.runner.decoder.spec.max_positions
        task = Task(method=make_method("beam", n=n, max_steps=depth), rule=rule, limits=Limits(**cut, max_positions=positions),
                    problem=Problem(id="bench", problem=text_of(148), answer=None), prompt=[])  # fmt: skip
        ours = Ours(engine)
        result, spent = ours.search(task)
        scores = {node.identity: node.score for node in result.nodes if node.score is not None}
        same = replace(task, prompt=list(result.nodes[0].path[0].tokens), scores=scores)
        backend = "triton_blind" if bench.on_gpu else "per_branch"
        rooms = (tokens, 2 * max(4096, depth * (2 * step + 32)))
        runners = [ModelRunner(own.decoder, make_backend(backend, bench.device), num_blocks=-(-room // 16), block_size=16)
                   for own, room in zip(engine.runners, rooms, strict=True)]  # fmt: skip
        writer = Policy(runners[0], rule, max_rows=n, graphs=make_graphs(runners[0], rule))
        blind, taken = Blind(writer, RereadingPRM(runners[1], engine.scorer)), dict[str, Spent]()

        def run_ours() -> None:
            taken[OURS] = ours.search(task)[1]

        def run_blind() -> None:
            taken[BLIND] = blind.search(same)

        blind.search(replace(same, method=make_method("beam", n=4, max_steps=1), scores=None))  # a rehearsal
        times = raced(bench, {OURS: run_ours, BLIND: run_blind}, slow=True)
        case = f"beam, n={n}, {depth} steps of {step}"
        for name, seconds in times.seconds.items():
            done = taken[name]
            assert {node.identity for node in done.nodes} == {node.identity for node in spent.nodes}, f"{name} drew other steps"
            assert done.tokens_drawn == spent.tokens_drawn, f"{name} drew other tokens"
            bench.row(case, contender=name, seconds=seconds, policy_s=done.policy_seconds, prm_s=done.prm_seconds,
                      policy_tokens=done.policy_tokens, prm_tokens=done.prm_tokens, noise=times.noise,
                      rounds=times.rounds)  # fmt: skip
        bench.figure("search", case, times.ratio(BLIND), noise=times.noise, rounds=times.rounds)
        overlap(bench, engine, n, depth)


def overlap(bench: Bench, engine: Engine, n: int, depth: int) -> None:
    """The same work with the PRM reading in a stream of its own, beside the policy's ticks, and one after the other."""
    assert (scorer := engine.scorer) is not None
    count, start = bench.sizes.beside, scorer.start
    problems = [Problem(id=f"beside-{number}", problem=text_of(148), answer=None) for number in range(count)]
    method, drawn = make_method("beam", n=n // count, max_steps=depth), set[int]()

    def searched(begin: Callable[[], None]) -> None:
        engine.forget()
        scorer.start = begin  # type: ignore[method-assign]
        drawn.add(sum(len(node.tokens) for result in engine.search(problems, method) for node in result.nodes))

    def waiting() -> None:
        start()
        if scorer.under_way:
            scorer.finish()

    times = raced(bench, {BESIDE: lambda: searched(start), IN_TURN: lambda: searched(waiting)}, slow=True)
    scorer.start = start  # type: ignore[method-assign]
    case = f"{count} problems, beam, n={n // count}, {depth} steps"
    for name, seconds in times.seconds.items():
        bench.row(case, contender=name, seconds=seconds, policy_tokens=min(drawn), most_policy_tokens=max(drawn), noise=times.noise,
                  rounds=times.rounds)  # fmt: skip
    bench.figure("overlap", case, times.ratio(IN_TURN), noise=times.noise, rounds=times.rounds)
