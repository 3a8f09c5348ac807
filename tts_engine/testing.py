"""Doubles and makers that tests and benches share. Part of the package so that no test copies them."""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .branch import Branch, Finish, root_branch
from .search import Method
from .search.driver import Draw, Driver
from .search.requests import Program

# --- scripted searches: a policy and a PRM written down as tables, for hand-worked traces (no model, no tensors) ---------

StepRule = Callable[[Draw], tuple[str, Finish | None]]
_ENDINGS = {".": Finish.EOS, "~": Finish.LENGTH}


def scripted_policy(table: dict[str, str]) -> StepRule:
    """A policy from a table: the solution so far -> the steps drawn after it, in draw order, separated by blanks.

    A step that ends in "." ends its text (EOS), one that ends in "~" was cut at the token limit. Looking up a draw that the
    table does not hold is an error, so a trace cannot draw more than was written down.
    """
    steps = {solution: row.split() for solution, row in table.items()}

    def rule(draw: Draw) -> tuple[str, Finish | None]:
        text = steps[draw.branch.solution][draw.draw]
        return text, _ENDINGS.get(text[-1])

    return rule


def random_policy(seed: int, p_finish: float = 0.2, letters: str = "abcdef") -> StepRule:
    """A uniform toy policy: the step depends on seed and draw identity alone, so equal draws give equal steps anywhere."""

    def rule(draw: Draw) -> tuple[str, Finish | None]:
        rng = random.Random(f"{seed}/{draw.identity}")
        ending = rng.choice([".", "~"]) if rng.random() < p_finish else ""
        return rng.choice(letters) + ending, _ENDINGS.get(ending)

    return rule


def scripted_prm(table: dict[str, float]) -> Callable[[Branch], float]:
    """A PRM from a table: solution up to and including a step -> that step's score."""
    return lambda step: table[step.solution]


def random_prm(seed: int, levels: int = 5) -> Callable[[Branch], float]:
    """Scores on a coarse grid in [0, 1], so that ties are frequent."""
    return lambda step: random.Random(f"{seed}/{step.identity}").randrange(levels) / (levels - 1)


@dataclass(frozen=True, slots=True)
class Expanded:
    """One answered Expand of a played search: the parents' solutions (one per draw), the steps drawn, the draws themselves."""

    parents: list[str]
    steps: list[str]
    draws: tuple[Draw, ...]


def play(
    program: Program, policy: StepRule, prm: Callable[[Branch], float], max_steps: int = 40, newest_first: bool = False
) -> tuple[list[Branch], list[list[Expanded]]]:
    """Run a program to its end with scripted doubles. Returns its result, and for each round the Expands answered in it.

    `newest_first` answers the asks of a round in reverse, which must change nothing but the order of the records.
    """
    driver = Driver(program)
    rounds: list[list[Expanded]] = []
    while not driver.done:
        asks = driver.asks()
        expanded = []
        for ask in reversed(asks) if newest_first else asks:
            if ask.kind == "score":
                driver.answer(ask, [_scored(branch, prm) for branch in ask.branches])
                continue
            children = [_drawn(driver, draw, policy, max_steps) for draw in ask.draws]
            parents = [draw.branch.solution for draw in ask.draws]
            expanded.append(Expanded(parents, [child.text for child in children], ask.draws))
            driver.answer(ask, children)
        if expanded:
            rounds.append(expanded)
    return driver.result, rounds


def play_method(
    method: Method, policy: StepRule, prm: Callable[[Branch], float], **how: bool
) -> tuple[list[Branch], list[list[Expanded]]]:
    """`play` for a method, from an empty prompt."""
    return play(method.program(root_branch(())), policy, prm, method.max_steps, **how)


def solutions(branches: Sequence[Branch]) -> list[str]:
    return [branch.solution for branch in branches]


def _drawn(driver: Driver, draw: Draw, policy: StepRule, max_steps: int) -> Branch:
    while True:
        text, finish = policy(draw)
        child = Branch(draw.branch, tuple(text.encode()), text, draw.identity, draw.lane, draw.draw, finish)
        if not draw.to_end or child.finished:
            return child
        if child.depth >= max_steps:
            return child.ended(Finish.DEPTH)
        draw = driver.next_draw(child, draw.lane, to_end=True)


def _scored(branch: Branch, prm: Callable[[Branch], float]) -> Branch:
    """The branch with a score on every step; scores already there are kept."""
    if branch.parent is None:
        return branch
    parent = _scored(branch.parent, prm)
    if parent is branch.parent and branch.score is not None:
        return branch
    return replace(branch, parent=parent, score=prm(branch) if branch.score is None else branch.score)


# --- small random checkpoints, and forwards laid out by hand -------------------------------------------------------------

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip


def random_model(family: str, *, seed: int = 0, **sizes: Any) -> Any:
    """A transformers model of the family ("llama", "mistral", "qwen2" or "qwen3"), float32, seeded, with every tensor random,
    biases and norms too.

    sizes: fields of the family's config that should differ from a tiny one's.
    """
    import torch
    import transformers

    classes = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
               "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
               "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
               "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)}  # fmt: skip
    config_class, model_class = classes[family]
    tiny = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**tiny | sizes)).eval()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "norm" in name:
                    tensor.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    tensor.normal_(std=0.5)
                else:
                    tensor.normal_(std=1.0 if "embed" in name else tensor.shape[1] ** -0.5)
    return model


@dataclass(frozen=True, slots=True)
class ListedPaths:
    """Paths written out: row b is slots[b]. Rows that begin with the same slots share them."""

    slots: Sequence[Sequence[int]]

    def context_slots(self) -> Any:
        import numpy as np

        context = np.zeros((len(self.slots), max(len(path) for path in self.slots)), np.int32)
        for b, path in enumerate(self.slots):
            context[b, : len(path)] = path
        return context

    def forest(self) -> Any:
        """A node ends wherever rows part or one ends."""
        import numpy as np

        from . import _C  # type: ignore[attr-defined]

        parents, runs, node_of = list[int](), list[list[int]](), [0] * len(self.slots)

        def place(rows: list[int], depth: int, parent: int) -> None:
            by_slot: dict[int, list[int]] = {}
            for row in rows:
                if depth == len(self.slots[row]):
                    node_of[row] = parent
                else:
                    by_slot.setdefault(self.slots[row][depth], []).append(row)
            for group in by_slot.values():
                end = depth + 1
                while all(len(self.slots[row]) > end and self.slots[row][end] == self.slots[group[0]][end] for row in group):
                    end += 1
                parents.append(parent)
                runs.append(list(self.slots[group[0]][depth:end]))
                place(group, end, len(parents) - 1)

        place(list(range(len(self.slots))), 0, -1)
        lens = [len(run) for run in runs]
        columns = (parents, np.cumsum([0, *lens[:-1]]), lens, node_of, sum(runs, []))
        return _C.Forest(*(np.array(column, np.int32) for column in columns))


_handles = itertools.count()  # of rows: those of one layout are never those of another


def flat_layout(slots: Sequence[Sequence[int]], new: Sequence[int]) -> Any:
    """A BatchLayout written out: row b is the path that lies in slots[b], of which the last new[b] tokens are computed now."""
    import numpy as np

    from .attention.base import BatchLayout

    lens = np.array([len(path) for path in slots], np.int32)
    starts = [length - count for length, count in zip(lens, new, strict=True)]
    paths = ListedPaths(slots)
    forest = paths.forest()
    return BatchLayout(
        rows=np.array([next(_handles) for _ in slots], np.int64),
        starts=(forest.len[forest.node] - new).astype(np.int32),
        row_starts=np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        positions=np.concatenate([np.arange(start, length) for start, length in zip(starts, lens, strict=True)]).astype(np.int64),
        write_slots=np.concatenate([path[start:] for path, start in zip(slots, starts, strict=True)]).astype(np.int64),
        context_lens=lens,
        paths=paths,
    )


def poisoned_cache(spec: Any, num_slots: int, dtype: Any = None) -> Any:
    """A KVCache of NaN: whoever reads a slot that nobody wrote shows it in every output that it touches."""
    import torch

    from .kv.cache import KVCache

    cache = KVCache(num_layers=spec.num_layers, num_blocks=num_slots, block_size=1, num_kv_heads=spec.num_kv_heads,
                    head_dim=spec.head_dim, dtype=dtype or torch.float32)  # fmt: skip
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def run_rows(decoder: Any, backend: Any, cache: Any, slots: Sequence[Sequence[int]], new: Sequence[int],
             tokens: Sequence[Sequence[int]]) -> Any:  # fmt: skip
    """One forward of `flat_layout(slots, new)`; tokens[b] are the whole path's ids. Hidden states [sum(new), d]."""
    import torch

    layout = flat_layout(slots, new)
    ids = torch.tensor([t for path, count in zip(tokens, new, strict=True) for t in path[len(path) - count :]])
    return decoder.forward(ids, torch.from_numpy(layout.positions), cache=cache, backend=backend, plan=backend.plan(layout),
                           read_at=torch.arange(len(ids)))  # fmt: skip


# --- small random checkpoints that an engine can load: a policy and both kinds of PRM, with the embedded tokenizer ---------

LEANING = 6.0  # the constant that every token's embedding holds in its first place, see `_lean`


def random_policy_directory(directory: Path, *, seed: int = 0, leans: dict[str, float] | None = None, family: str = "qwen2",
                            **sizes: Any) -> Any:  # fmt: skip
    """Save a random policy into `directory`, tokenizer and all; the transformers model.

    leans: token -> what is added to its logit wherever it stands, about; by default steps and texts end after a dozen tokens.
    """
    from .embedded.tokenizer import END, PAD, QWEN_MARKER, SHEPHERD_TAG, STEP_END, build_tokenizer

    tokenizer = build_tokenizer()
    model = random_model(family, seed=seed, **_SMALL | {"vocab_size": tokenizer.get_vocab_size()} | sizes)
    leans = {STEP_END: 2.0, END: 1.0, PAD: -9.0, QWEN_MARKER: -9.0, SHEPHERD_TAG: -9.0, "<unk>": -9.0} | (leans or {})
    _lean(model, {tokenizer.token_to_id(token): lean for token, lean in leans.items()})
    _save(directory, model.config.to_dict() | {"architectures": [type(model).__name__]}, model.state_dict())
    return model


def random_prm_directory(directory: Path, kind: str, *, seed: int = 0, **sizes: Any) -> Any:
    """Save a random PRM of the family `kind` into `directory`; the transformers model whose hidden states it reads.

    "qwen2.5-math-prm" has a two-class head in the tensors score.0 and score.2 and no vocabulary head; "math-shepherd" is a
    causal language model whose config.json says so.
    """
    import torch

    from .embedded.tokenizer import build_tokenizer

    family = {"qwen2.5-math-prm": "qwen2", "math-shepherd": "llama"}[kind]
    model = random_model(family, seed=seed, **_SMALL | {"vocab_size": build_tokenizer().get_vocab_size()} | sizes)
    tensors = dict(model.state_dict())
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if kind == "math-shepherd":
        config["prm_family"] = kind
    else:
        config["architectures"] = ["Qwen2ForProcessRewardModel"]
        del tensors["lm_head.weight"]
        random, d = torch.Generator().manual_seed(seed), model.config.hidden_size
        for name, shape in {"score.0.weight": (d, d), "score.0.bias": (d,), "score.2.weight": (2, d), "score.2.bias": (2,)}.items():
            tensors[name] = torch.randn(shape, generator=random) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
    _save(directory, config, tensors)
    return model


_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
          "pad_token_id": 1}  # fmt: skip


def _save(directory: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    from .embedded.tokenizer import save_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    save_tokenizer(directory)


def _lean(model: Any, leans: dict[int, float]) -> None:
    """Add about leans[v] to every logit of token v: hidden place 0 becomes a constant that no layer writes to."""
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = LEANING
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.model.norm.weight[0] = 1
        model.lm_head.weight[:, 0] = 0
        for token, lean in leans.items():
            model.lm_head.weight[token, 0] = lean / 3  # LEANING over the size of a hidden unit, about 2


# --- a policy that writes what it is told, through the real Policy, tree and ledger ---------------------------------------


class ChainDecoder:
    """Stands in for a Decoder: the token that `follows` names comes after each token, whatever stood before."""

    def __init__(self, spec: Any, follows: dict[int, int]) -> None:
        import torch

        self.spec, self.follows = spec, follows
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.forwards: list[list[int]] = []  # the token ids of each forward

    def forward(self, token_ids: Any, positions: Any, *, cache: Any, backend: Any, plan: Any, read_at: Any) -> Any:
        self.forwards.append(token_ids.tolist())
        return token_ids[read_at]

    def logits(self, hidden: Any) -> Any:
        import torch

        logits = torch.zeros(len(hidden), self.spec.vocab_size)
        for row, token in enumerate(hidden.tolist()):
            logits[row, self.follows[token]] = 1000.0
        return logits


def tiny_spec(**sizes: Any) -> Any:
    """A DecoderSpec of round numbers."""
    from .models.spec import DecoderSpec

    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 8, "intermediate_size": 10,
              "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    return DecoderSpec.from_hf(config | sizes, "tiny_spec")


def chain_policy(pieces: Sequence[bytes], *, ends: Sequence[int] = (), num_blocks: int = 256, block_size: int = 4,
                 max_rows: int = 64) -> Any:  # fmt: skip
    """A Policy whose token i says pieces[i] and is followed by token i + 1; the last one follows itself."""
    from .attention import make_backend
    from .policy import Policy, StepRule
    from .runner import ModelRunner

    spec = tiny_spec()
    decoder: Any = ChainDecoder(spec, {i: min(i + 1, len(pieces) - 1) for i in range(len(pieces))})
    runner = ModelRunner(decoder, make_backend("reference"), num_blocks=num_blocks, block_size=block_size)
    return Policy(runner, StepRule(pieces, ends, spec.vocab_size), max_rows=max_rows)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What `draw_all` gives: the program's result, every child in the order it closed, and the costs."""

    branches: list[Branch]
    nodes: list[Branch]
    ledger: Any


def draw_all(policy: Any, program: Program, prompt_tokens: int, *, temperature: float = 0.0, max_step_tokens: int = 64,
             max_tokens: int = 256, max_positions: int = 512, max_steps: int = 40, seed: int = 0) -> Drawn:  # fmt: skip
    """Run a program that asks no scores with `policy` alone; the law of blocks is checked after every tick."""
    from .ledger import PolicyLedger
    from .policy import DrawContext, Limits
    from .sampling import Sampling, philox_key

    driver, nodes, ledger = Driver(program), list[Branch](), PolicyLedger()
    context = DrawContext(driver=driver, sampling=Sampling(temperature=temperature), key=philox_key(seed, "draw_all"),
                          limits=Limits(max_step_tokens=max_step_tokens, max_tokens=max_tokens, max_positions=max_positions),
                          max_steps=max_steps, prompt_tokens=prompt_tokens, ledger=ledger, drawn=nodes.append)  # fmt: skip
    while not driver.done:
        for ask in driver.asks():
            policy.submit(context, ask)
        policy.tick()
        check_blocks(policy.runner.tree)
    return Drawn(driver.result, nodes, ledger)


def check_blocks(tree: Any) -> Any:
    """The law of blocks: every block is in one state, and the tree's own books are right; the counts."""
    counts = tree.counts()
    assert sum(counts) == tree.num_blocks, f"blocks were lost or made: {counts} of {tree.num_blocks}"
    tree.check()
    return counts
