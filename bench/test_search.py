"""Whole searches, PRM readings and decoding at Qwen2.5-0.5B's shape with random weights, against engines that share less.

By default a slice of the model, one layer (see baselines/models.py), and the short cases; `--layers 24` takes the whole model,
`--long` all cases, `-k` picks some of them, as in `-k beam-64-10-bf16`, and `--turns` says how often each is run.

Steps have drawn lengths, 50 tokens on average, and every contender goes on with the branches that our scores choose: all draw and
score the same steps, which is asserted before anything is told. What they say is not compared here; test_demo.py does that.
"""

import itertools
import random
import string
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from tts_engine import _C
from tts_engine.attention import make_backend
from tts_engine.branch import Branch, root_branch
from tts_engine.draws import Limits
from tts_engine.engine import Engine
from tts_engine.ledger import PRMLedger
from tts_engine.models.linear import Widened
from tts_engine.models.weights import RandomCheckpoint
from tts_engine.prm.scorer import ScoreContext
from tts_engine.runner import ModelRunner
from tts_engine.search import Driver, Majority, make_method
from tts_engine.search.requests import Score
from tts_engine.tasks.problems import Problem

from .baselines.lockstep import Spent, Task, search
from .baselines.models import SHAPE, make_models, sliced, text_of
from .baselines.ours import Ours, read_everything
from .baselines.peers import PEERS, Missing
from .baselines.sharing_blind import RereadingPRM, SharingBlindPolicy
from .baselines.transformers_loop import TransformersPolicy, TransformersPRM, cache_bytes, language_model

pytestmark = pytest.mark.timeout(0)  # the long cases take what they take
OUR_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "int8": "int8"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}  # of KV, and of whoever has no bytes
PROMPT, STEP, WIDTH = 150, 50, 4
LIMITS = {"max_step_tokens": 2 * STEP, "max_tokens": 4096}
ROOM = 120_000  # tokens of KV that each of our models may have; memory is taken only where it is used
OURS, BLIND, BLIND_KERNEL, LOOP = "ours", "sharing-blind, PRM re-read", "the same with our kernel", "transformers loop"


class Models:
    """One slice of the policy and the PRM: ours, and what the baselines make of the same weights, each when first wanted."""

    def __init__(self, directory, layers: int, dtype: str) -> None:
        self.layers, self.dtype, self.our_dtype = layers, DTYPES[dtype], OUR_DTYPES[dtype]
        self.directories = make_models(directory, layers)
        self.checkpoints = [RandomCheckpoint(path) for path in self.directories]
        self.token_bytes = self.checkpoints[0].spec.kv_bytes_per_token(self.dtype)
        self.engine = self.load(*self.directories, steps=str(STEP), kv_bytes=2 * ROOM * self.token_bytes, **LIMITS)
        self.name = f"{layers} of {SHAPE['num_hidden_layers']} layers, {dtype}"
        for runner in self.engine.runners:
            self.trimmed(runner)
        self.ours = Ours(self.engine)
        self._loops: dict[str, tuple] = {}

    def load(self, *directories, **settings) -> Engine:
        return Engine.from_pretrained(*directories, load="random", dtype=self.our_dtype, system="", **settings)

    def trimmed(self, runner: ModelRunner) -> ModelRunner:
        if self.layers < SHAPE["num_hidden_layers"]:
            read_everything(runner)
        return runner

    def loop(self, name: str, rows: int = 0, path: int = 0) -> tuple:
        """Who writes and who reads; sharing-blind ones with room for so many rows of so many tokens, and as many copies."""
        engine = self.engine
        if name != LOOP:
            backend = {BLIND: "per_branch", BLIND_KERNEL: "native"}[name]
            rooms = (2 * rows * path, 20_000)
            runners = [self.trimmed(ModelRunner(own.decoder, make_backend(backend), num_blocks=-(-room // 16), block_size=16))
                       for own, room in zip(engine.runners, rooms, strict=True)]  # fmt: skip
            return SharingBlindPolicy(runners[0]), RereadingPRM(runners[1], engine.scorer)
        if not self._loops:
            policy, prm = (language_model(checkpoint, self.dtype) for checkpoint in self.checkpoints)
            self._loops[LOOP] = TransformersPolicy(policy), TransformersPRM(prm, engine.scorer.spec, self.checkpoints[1])
        return self._loops[LOOP]


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    """By dtype, at the layers asked for."""
    made: dict[str, Models] = {}

    def of(dtype: str) -> Models:
        if dtype not in made:
            made[dtype] = Models(tmp_path_factory.mktemp(dtype), request.config.getoption("--layers"), dtype)
        return made[dtype]

    return of


@pytest.fixture
def unless_long(request):
    """Skip what takes long."""

    def skip(short: bool) -> None:
        if not (short or request.config.getoption("--long")):
            pytest.skip("takes many minutes: give --long")

    return skip


def told(spent: Spent, seconds: float) -> dict[str, object]:
    """Both rates are of the tokens in the steps drawn and scored, however many a contender computed."""
    return {
        "policy tokens/s": spent.tokens_drawn / spent.policy_seconds,
        "PRM tokens/s": spent.tokens_drawn / spent.prm_seconds,
        "policy tokens": spent.policy_tokens,
        "PRM tokens": spent.prm_tokens,
        "policy KV MB": spent.policy_kv_bytes / 1e6,
        "PRM KV MB": spent.prm_kv_bytes / 1e6,
    }


def searched(models: Models, name: str, n: int, depth: int) -> tuple[Task, Spent]:
    """Ours once, and the task for the others to do as much."""
    problem, method = Problem(id="bench", problem=text_of(PROMPT - 2), answer=None), make_method(name, n=n, max_steps=depth)
    given = {"method": method, "problem": problem, "rule": models.engine.policy.rule}
    limits = Limits(**LIMITS, max_positions=SHAPE["max_position_embeddings"])
    result, spent = models.ours.search(Task(**given, prompt=[], limits=limits))
    prompt = list(result.nodes[0].path[0].tokens)
    assert len(prompt) == PROMPT, f"the prompt has {len(prompt)} tokens"
    scores = {node.identity: node.score for node in result.nodes}
    return Task(**given, prompt=prompt, limits=limits, scores=scores), spent


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [5, 10, 20])
@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("name", ["beam", "dvts"])
def test_search(race, models, unless_long, name, n, depth, dtype):
    unless_long((name, n, depth, dtype) == ("beam", 16, 5, "bf16"))
    models = models(dtype)
    task, spent = searched(models, name, n, depth)

    def ours():
        return models.ours.search(task)[1]

    def loop(writer, reader):
        search(replace(task, method=make_method(name, n=WIDTH, max_steps=1), scores=None), writer, reader)  # a rehearsal

        def run():
            done = search(task, writer, reader)[1]
            assert (done.tokens_drawn, done.steps_scored) == (spent.tokens_drawn, spent.steps_scored)
            return done

        return run

    rows = {"rows": n, "path": PROMPT + round(1.2 * depth * STEP)}
    contenders = {OURS: ours} | {who: loop(*models.loop(who, **rows)) for who in (BLIND, BLIND_KERNEL, LOOP)}
    race(f"{name}, n={n}, {depth} steps of {STEP}, {models.name}", contenders, slow=True, columns=told)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 16, 64, 256])
def test_growth(race, models, unless_long, n, dtype):
    """Seconds and bytes of one beam search as n grows; beside them what paths of their own would take."""
    unless_long(n < 64 and dtype == "bf16")
    models = models(dtype)
    task, spent = searched(models, "beam", n, 10)
    paths = Counter[int]()
    for node in spent.nodes:
        paths[node.depth] += PROMPT + node.num_tokens
    unshared = max(paths.values()) * models.token_bytes / 1e6
    race(f"growth, beam, n={n}, 10 steps of {STEP}, {models.name}", {OURS: lambda: models.ours.search(task)[1]}, slow=True,
         columns=lambda spent, seconds: told(spent, seconds) | {"policy KV MB, unshared": unshared})  # fmt: skip


# The PRM alone


class Reading:
    """64 branches, four behind each of 16 that were read before: on a problem of 512 tokens, each step 64 tokens, markers among
    them."""

    SURVIVORS, LEVELS, PROBLEM, STEP = 16, 4, 512, 64

    def __init__(self, scorer) -> None:
        self.scorer, self._numbers = scorer, itertools.count(1)
        spec = scorer.spec
        root = root_branch((), text_of(self.PROBLEM - len(spec.opening("a")) + 1))
        branches = [root] * self.SURVIVORS
        for _ in range(self.LEVELS - 1):
            branches = self.scored([self.grown(branch) for branch in branches])
        self.survivors = branches
        ids, _ = spec.render(root.text, [step.text for step in self.grown(branches[0]).steps])
        assert len(ids) == self.PROBLEM + self.LEVELS * self.STEP, f"a path has {len(ids)} tokens"

    def grown(self, branch: Branch) -> Branch:
        """A step that nobody has read."""
        number = next(self._numbers)
        marker = len(self.scorer.spec.step("a", branch.parent is None)) - 1
        letters = random.Random(number).choices(string.ascii_lowercase, k=self.STEP)
        text = "".join(letter if i % 2 == 0 else str(i % 10) for i, letter in enumerate(letters[: self.STEP - marker]))
        return Branch(branch, (0,), text, number)

    def candidates(self) -> list[Branch]:
        return [self.grown(branch) for branch in self.survivors for _ in range(WIDTH)]

    def scored(self, branches: list[Branch]) -> list[Branch]:
        def program():
            return (yield Score(branches))

        driver = Driver(program())
        opening = self.scorer.spec.opening(branches[0].path[0].text)
        context = ScoreContext(driver=driver, opening=opening, ledger=PRMLedger(), scored=lambda step: None)
        for ask in driver.asks():
            self.scorer.submit(context, ask)
        while self.scorer.num_open:
            self.scorer.tick()
        return driver.result


@pytest.mark.parametrize("dtype", DTYPES)
def test_prm(race, models, unless_long, dtype):
    """New steps of 64 branches on paths of 768 tokens: read behind what was read before, and with everything before them."""
    unless_long(dtype == "bf16")
    models = models(dtype)
    models.engine.forget()
    reading = Reading(models.engine.scorer)
    _, blind = models.loop(BLIND_KERNEL, rows=1, path=16)
    loop = models.loop(LOOP)[1]
    one_by_one = TransformersPRM(loop.model, loop.spec, models.checkpoints[1], few=1)
    kept = kept_cache(loop, reading)
    candidates = reading.candidates()
    contenders = {
        OURS: lambda: reading.scored(reading.candidates()),
        "our kernel, paths re-read": lambda: blind.read(candidates, Spent()),
        "transformers, paths re-read one by one": lambda: one_by_one.read(candidates, Spent()),
        "transformers, cache kept, new tokens only": kept,
    }
    new = len(candidates) * Reading.STEP
    contenders |= products(models, rows=new, logits=0)
    race(f"PRM, 64 steps of 64 on paths of 768, {models.name}", contenders, slow=True,
         columns=lambda _, seconds: {"new tokens/s": new / seconds})  # fmt: skip


def kept_cache(loop: TransformersPRM, reading: Reading):
    """transformers with the survivors' keys and values kept, once for each candidate; the new tokens in one batch."""
    model, spec = loop.model, loop.spec
    before = [spec.render(branch.path[0].text, [step.text for step in branch.steps])[0] for branch in reading.survivors]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor(before), past_key_values=cache, logits_to_keep=1)
        cache.batch_select_indices(torch.arange(len(before)).repeat_interleave(WIDTH))

    def run():
        steps = torch.tensor([spec.step(branch.text, False) for branch in reading.candidates()])
        with torch.inference_mode():
            logits = model(input_ids=steps, past_key_values=cache, logits_to_keep=1).logits
            cache.crop(-steps.shape[1])
            return logits[:, 0, [spec.readout.plus, spec.readout.minus]].float().softmax(-1)[:, 0].tolist()

    return run


# Decoding alone


def products(models: Models, *, rows: int, logits: int, times: int = 1) -> dict:
    """The matrix products of a forward and nothing else, in each of PyTorch's ways with them and in ours: the fastest is the
    ceiling."""
    config = sliced(models.layers)
    d, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    wide = (heads + 2 * config["num_key_value_heads"]) * d // heads
    shapes = [(rows, wide, d), (rows, d, d), (rows, 2 * inner, d), (rows, d, inner)] * config["num_hidden_layers"]
    shapes += [(logits, config["vocab_size"], d)] if logits else []

    def alone(way):
        work = [(way(torch.randn(n, k, dtype=models.dtype)), torch.randn(m, k, dtype=models.dtype)) for m, n, k in shapes]
        if way is in_bytes:
            work = [(multiply, torch.randint(1, 256, x.shape, dtype=torch.uint8)) for multiply, x in work]

        def run():
            with torch.inference_mode():
                for _ in range(times):
                    for multiply, x in work:
                        multiply(x)

        return run

    ways = {"in bytes": in_bytes} if models.our_dtype == "int8" else WAYS
    return {f"its matrix products alone, {name}": alone(way) for name, way in ways.items()}


def plain(weight):
    return lambda x: F.linear(x, weight)


def packed(weight):
    kept = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, kept, None, "none", [], "")


def in_bytes(weight):
    kept = torch.ops.onednn.qlinear_prepack(weight.mul(100).to(torch.int8), None)
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    how = (1.0, 0, torch.float32, "none", [], "")
    return lambda x: torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, kept, ones, zeros, None, *how)


WAYS = {"plain": plain}
WAYS |= {"packed": packed} if torch.backends.mkldnn.is_available() else {}
WAYS |= {"widened": Widened} if _C.multiplies_floats() else {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_decode(race, tell, models, unless_long, tmp_path, rows, dtype):
    """Branches on one prompt of 512 tokens that is read already, 64 new tokens each."""
    unless_long(dtype == "bf16")
    models, new = models(dtype), 64
    problem = Problem(id="bench", problem=text_of(512 - 2), answer=None)
    room = (512 + 2 * rows * new) * models.token_bytes
    with models.load(models.directories[0], steps="1000", max_step_tokens=new, max_tokens=new, kv_bytes=room) as engine:
        models.trimmed(engine.policy.runner)
        method = Majority(n=rows, max_steps=1)
        [result] = engine.search(problem, method)
        assert [len(node.tokens) for node in result.nodes] == [new] * rows
        case, prompt = f"decode, {rows} branches on 512, {models.name}", result.nodes[0].path[0].tokens
        contenders = {
            OURS: lambda: engine.search(problem, method),
            "transformers, prompt's cache reused": cached_decode(models, prompt, rows, new),
        }
        contenders |= products(models, rows=rows, logits=rows, times=new)
        for name, adapter in PEERS.items():
            try:
                contenders[name] = adapter(models.checkpoints[0], tmp_path, prompt, rows, new, models.our_dtype == "int8")
            except Missing as reason:
                tell(case, contender=name, missing=str(reason))
        spec = models.checkpoints[0].spec
        gflop = 1e-9 * (spec.flops_per_token + spec.lm_head_flops) * rows * new  # of the matrix products
        race(case, contenders, gflop=gflop, slow=True,
             columns=lambda _, seconds: {"tokens/s": rows * new / seconds})  # fmt: skip


def cached_decode(models: Models, prompt, rows: int, new: int):
    """transformers as its users write it: the prompt read once, its cache repeated, one token a row at a time."""
    model = models.loop(LOOP)[0].model
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(input_ids=torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(rows)

    def run():
        logits = first.expand(rows, -1)
        with torch.inference_mode():
            for drawn in range(1, new + 1):
                token = torch.multinomial((logits.float() / 0.7).softmax(-1), 1)
                if drawn < new:
                    logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            cache.crop(-(new - 1))
        return cache_bytes(cache)

    return run
