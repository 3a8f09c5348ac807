"""Decoding timed: a tick of many branches over the least it could take, whole beam searches over an engine that shares nothing."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tts_engine.attention import make_backend
from tts_engine.branch import Branch, root_branch
from tts_engine.engine import Engine
from tts_engine.ledger import PolicyLedger
from tts_engine.models.decoder import Decoder
from tts_engine.policy import DrawContext, Limits
from tts_engine.runner import ModelRunner
from tts_engine.sampling import Sampling, philox_key
from tts_engine.search import Driver, make_method
from tts_engine.search.requests import Expand
from tts_engine.tasks.problems import Problem

from ..baselines import lockstep
from ..baselines.lockstep import Spent, Task
from ..baselines.models import text_of
from ..baselines.ours import Ours
from ..baselines.sharing_blind import RereadingPRM, SharingBlindPolicy
from .models import NAMES, load
from .race import copy_bandwidth, race, raced
from .setting import PAIR_PRM, Bench
from .trees import beam

TEMPERATURE = 0.7
OURS, BLIND = "ours", "sharing-blind, PRM re-read"


@dataclass
class Standing:
    """An engine whose policy has a whole grove in its KV tree, and the branches that stand on its rows."""

    engine: Engine
    branches: list[Branch]
    prompt_tokens: int

    @classmethod
    def at(cls, bench: Bench, engine: Engine) -> "Standing":
        """What keys and values hold is drawn, not computed."""
        grove, runner, rng = beam(bench.sizes.tree), engine.policy.runner, np.random.default_rng(0)
        for table in (runner.cache.k, runner.cache.v):
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
        return cls(engine, [made[row] for row in grove.rows], len(made[0].tokens))

    def step(self, new: int) -> None:
        """A step of so many tokens behind every branch, all of them cut there."""

        def program():
            return (yield Expand(self.branches))

        policy, driver = self.engine.policy, Driver(program())
        limits = Limits(max_step_tokens=new, max_tokens=1 << 30, max_positions=1 << 30)
        context = DrawContext(driver=driver, sampling=Sampling(temperature=TEMPERATURE), key=philox_key(0, "tick"), limits=limits,
                              max_steps=1 << 20, prompt_tokens=self.prompt_tokens, ledger=PolicyLedger(),
                              drawn=lambda branch: None)  # fmt: skip
        for ask in driver.asks():
            policy.submit(context, ask)
        while policy.busy:
            policy.tick()
        assert [len(branch.tokens) for branch in driver.result] == [new] * len(self.branches), "a step ended on its own"


def tick(bench: Bench) -> None:
    """Seconds of one tick in the middle of a step, over what reading keys, values and weights and multiplying must take."""
    sizes = bench.sizes
    grove, directory, (short, long) = beam(sizes.tree), bench.model("policy", sizes.policy), sizes.ticks
    copy = copy_bandwidth(bench)
    room = 2 * (grove.num_slots + len(grove.rows) * (16 + long))
    how = {"dtype": NAMES[sizes.dtype], "steps": "1000000", "kv_bytes": room * _token_bytes(sizes.policy, sizes.dtype),
           "max_rows": len(grove.rows)}  # fmt: skip
    with load(bench, directory, **how) as engine:
        standing = Standing.at(bench, engine)
        standing.step(short)
        times = raced(bench, {"long": lambda: standing.step(long), "short": lambda: standing.step(short)}, slow=True)
        seconds = (times.seconds["long"] - times.seconds["short"]) / (long - short)
        decoder = engine.policy.runner.decoder
        products = products_alone(bench, decoder, len(grove.rows))
        tokens = grove.distinct + len(grove.rows) * (short + long) / 2
        kv = tokens * decoder.spec.kv_bytes_per_token(decoder.dtype) / copy
        case = f"{len(grove.rows)} branches, {sizes.policy['num_hidden_layers']} layers"
        bench.row(case, contender="tick", ms=1e3 * seconds, products_ms=1e3 * products, kv_ms=1e3 * kv, noise=times.noise,
                  rounds=times.rounds)  # fmt: skip
        bench.figure("tick", case, seconds / (products + kv), noise=times.noise)


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


def search(bench: Bench) -> None:
    """Beam search, drawn lengths: the same draws and steps for both, which is asserted before anything is told."""
    sizes = bench.sizes
    n, depth, step = sizes.search
    policy, prm = bench.model("policy", sizes.policy), bench.model("prm-pair", sizes.prm, PAIR_PRM)
    longest = 150 + depth * (2 * step + 16)
    tokens = 2 * n * longest  # of two rounds' branches, as if none shared anything
    bytes_ = sum(_token_bytes(config, sizes.dtype) for config in (sizes.policy, sizes.prm))
    limits = {"max_step_tokens": 2 * step, "max_tokens": depth * 2 * step}
    with load(bench, policy, prm, dtype=NAMES[sizes.dtype], steps=str(step), kv_bytes=tokens * bytes_ // 2, max_rows=n,
              **limits) as engine:  # fmt: skip
        problem, method = Problem(id="bench", problem=text_of(148), answer=None), make_method("beam", n=n, max_steps=depth)
        ours = Ours(engine)
        cut = Limits(**limits, max_positions=engine.policy.runner.decoder.spec.max_positions)
        task = Task(method=method, problem=problem, prompt=[], rule=engine.policy.rule, limits=cut)
        result, spent = ours.search(task)
        scores = {node.identity: node.score for node in result.nodes if node.score is not None}
        same = replace(task, prompt=list(result.nodes[0].path[0].tokens), scores=scores)
        backend = "triton_blind" if bench.on_gpu else bench.backend
        rooms = (tokens, 2 * max(longest, 4096))
        runners = [ModelRunner(own.decoder, make_backend(backend, bench.device), num_blocks=-(-room // 16), block_size=16)
                   for own, room in zip(engine.runners, rooms, strict=True)]  # fmt: skip
        assert engine.scorer is not None
        writer, reader = SharingBlindPolicy(runners[0]), RereadingPRM(runners[1], engine.scorer)
        taken: dict[str, Spent] = {}

        def run_ours() -> None:
            taken[OURS] = ours.search(task)[1]

        def run_blind() -> None:
            taken[BLIND] = lockstep.search(same, writer, reader)[1]
            done = taken[BLIND]
            assert (done.tokens_drawn, done.steps_scored) == (spent.tokens_drawn, spent.steps_scored), "other draws than ours"

        began = time.monotonic()
        lockstep.search(replace(same, method=make_method("beam", n=4, max_steps=1), scores=None), writer, reader)  # a rehearsal
        bench.row("rehearsal", seconds=time.monotonic() - began)
        times = raced(bench, {OURS: run_ours, BLIND: run_blind}, slow=True)
        case = f"beam, n={n}, {depth} steps of {step}"
        for name, seconds in times.seconds.items():
            done = taken[name]
            bench.row(case, contender=name, seconds=seconds, policy_s=done.policy_seconds, prm_s=done.prm_seconds,
                      policy_tokens=done.policy_tokens, prm_tokens=done.prm_tokens, policy_kv_mb=done.policy_kv_bytes / 1e6,
                      prm_kv_mb=done.prm_kv_bytes / 1e6, noise=times.noise, rounds=times.rounds)  # fmt: skip
        bench.figure("search", case, times.ratio(BLIND), noise=times.noise, rounds=times.rounds)
