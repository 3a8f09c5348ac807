"""Doubles and makers that tests and benches share. Part of the package so that no test copies them."""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
    driver = Driver(program, lambda branches: [branch.text for branch in branches])
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


@dataclass(frozen=True)
class ListedPaths:
    """Paths written out: row b is slots[b]. Rows that begin with the same slots share them."""

    slots: Sequence[Sequence[int]]

    @cached_property
    def context_slots(self) -> Any:
        import numpy as np

        context = np.zeros((len(self.slots), max(len(path) for path in self.slots)), np.int32)
        for b, path in enumerate(self.slots):
            context[b, : len(path)] = path
        return context

    @cached_property
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
    forest = paths.forest
    return BatchLayout(
        rows=np.array([next(_handles) for _ in slots], np.int64),
        starts=(forest.len[forest.node] - new).astype(np.int32),
        ends=forest.len[forest.node],
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
    for table in cache.tables:
        table.fill_(torch.nan)
    return cache


def run_rows(decoder: Any, backend: Any, cache: Any, slots: Sequence[Sequence[int]], new: Sequence[int],
             tokens: Sequence[Sequence[int]], read: Sequence[int] | None = None) -> Any:  # fmt: skip
    """One forward of `flat_layout(slots, new)`; tokens[b] are the whole path's ids. Hidden states [sum(new), d], or at `read`."""
    import numpy as np
    import torch

    layout = flat_layout(slots, new)
    ids = torch.tensor([t for path, count in zip(tokens, new, strict=True) for t in path[len(path) - count :]])
    plan, read_at = backend.plan(layout), np.arange(len(ids)) if read is None else np.array(read, np.int64)
    return decoder.forward(ids, torch.from_numpy(layout.positions), cache=cache, backend=backend, plan=plan,
                           read_at=torch.from_numpy(read_at),
                           read_plan=plan if read is None else backend.plan(layout.only(read_at)))  # fmt: skip


class TicksOneByOne:
    """What graphs.DecodeGraphs must do: for every tick a forward of the rows that go on, and each row's draw by its definition."""

    def __init__(self, decoder: Any, cache: Any, backend: Any, *, after: Any, ends: Any, last_state: int) -> None:
        self._decoder, self._cache, self._backend = decoder, cache, backend
        self._after, self._ends, self._last_state = after, ends, last_state
        self._drawn: Any = None

    def plan(self, layout: Any) -> Any:
        from .graphs import TICKS, Outlook

        slots = layout.context_slots
        return Outlook([slots[b, :length].tolist() for b, length in enumerate(layout.context_lens)], TICKS)

    def start(self, outlook: Any, draws: Any) -> None:
        import numpy as np

        from .graphs import Drawn

        assert self._drawn is None, "what was started must be finished first"
        rows, ticks = range(len(draws.token)), len(draws.slots) - 1
        paths, newest, states, stops = list(outlook.tree), draws.token.tolist(), draws.state.copy(), np.zeros(len(rows), np.int32)
        assert 1 <= ticks <= outlook.ticks and [path[-1] for path in paths] == draws.slots[0].tolist()
        tokens = np.zeros((ticks, len(rows)), np.int32)
        drawn = np.zeros(len(rows), np.int32)
        for tick in range(ticks):
            live = [b for b in rows if not stops[b]]
            if not live:
                break
            read = [[0] * (len(paths[b]) - 1) + [newest[b]] for b in live]
            hidden = run_rows(self._decoder, self._backend, self._cache, [paths[b] for b in live], [1] * len(live), read)
            logits = self._decoder.logits(hidden)
            for place, b in enumerate(live):
                newest[b] = token = self._token(logits, place, draws, b, tick)
                tokens[tick, b] = token
                drawn[b] += 1
                states[b] = max(states[b] - 1, self._last_state) if self._after is None else self._after[states[b], token]
                closed, cut = states[b] == self._last_state, drawn[b] >= draws.room[b]
                stops[b] = 1 * bool(self._ends[token]) + 2 * bool(closed) + 4 * bool(cut) + 8 * (token < 0)
                paths[b] = [*paths[b], int(draws.slots[tick + 1, b])]
        self._drawn = Drawn(tokens=tokens, drawn=drawn, state=states, stop=stops)

    def _token(self, logits: Any, place: int, draws: Any, b: int, tick: int) -> int:
        import numpy as np

        from .sampling import Sampling, sample_slowly

        how = {name: getattr(draws, name)[b].item() for name in ("temperature", "top_k", "top_p", "min_p")}
        one = slice(b, b + 1)
        return int(sample_slowly(logits, np.array([place]), Sampling(**how), draws.key[one], draws.identity[one],
                                 draws.position[one] + tick + 1)[0])  # fmt: skip

    def finish(self) -> Any:
        drawn, self._drawn = self._drawn, None
        assert drawn is not None, "nothing was started"
        return drawn


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

    Its config.json names the architecture where that means the family, else the family; its tensors are the decoder's and the
    family's head.
    """
    import torch

    from .embedded.tokenizer import build_tokenizer
    from .prm.families import FAMILIES

    base = {"math-shepherd": "llama", "rlhflow": "llama"}.get(kind, "qwen2")
    tokenizer = tiny_tokenizer() if kind == "rlhflow" else None  # the embedded one's chat has no special tokens around a turn
    vocab_size = len(tokenizer) if tokenizer is not None else build_tokenizer().get_vocab_size()
    model = random_model(base, seed=seed, **_SMALL | {"vocab_size": vocab_size} | sizes)
    tensors, family = dict(model.state_dict()), FAMILIES[kind]
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "prm_family": kind}
    if family.architectures:
        config |= {"architectures": list(family.architectures), "prm_family": None}
        del tensors["lm_head.weight"]
    random, d = torch.Generator().manual_seed(seed), model.config.hidden_size
    shapes = {"score.0.weight": (d, d), "score.0.bias": (d,), "score.2.weight": (2, d), "score.2.bias": (2,),
              "v_head.summary.weight": (1, d), "v_head.summary.bias": (1,)}  # fmt: skip
    for name, shape in shapes.items():
        if name in family.head:
            tensors[name] = torch.randn(shape, generator=random) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
    _save(directory, config, tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
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

    def rows_beside(self, count: int) -> int:
        return 0

    def forward(self, token_ids: Any, positions: Any, *, read_at: Any, **how: Any) -> Any:
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
    from .policy import Policy
    from .runner import ModelRunner
    from .steps import MarkedSteps

    spec = tiny_spec()
    decoder: Any = ChainDecoder(spec, {i: min(i + 1, len(pieces) - 1) for i in range(len(pieces))})
    runner = ModelRunner(decoder, make_backend("reference"), num_blocks=num_blocks, block_size=block_size)
    return Policy(runner, MarkedSteps(pieces, ends, spec.vocab_size), max_rows=max_rows)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What `draw_all` gives: the program's result, every child in the order it closed, and the costs."""

    branches: list[Branch]
    nodes: list[Branch]
    ledger: Any


def draw_all(policy: Any, program: Program, prompt_tokens: int, *, temperature: float = 0.0, max_step_tokens: int = 64,
             max_tokens: int = 256, max_positions: int = 512, max_steps: int = 40, seed: int = 0) -> Drawn:  # fmt: skip
    """Run a program that asks no scores with `policy` alone; the law of blocks is checked after every tick."""
    from .draws import DrawContext, Limits
    from .ledger import PolicyLedger
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
    policy.accounts.count(context)
    return Drawn(driver.result, nodes, ledger)


def check_blocks(tree: Any) -> Any:
    """The law of blocks: every block is in one state, and the tree's own books are right; the counts."""
    counts = tree.counts()
    assert sum(counts) == tree.num_blocks, f"blocks were lost or made: {counts} of {tree.num_blocks}"
    tree.check()
    return counts


# --- what every PRM family has to keep, whoever wrote it -------------------------------------------------------------------

# Text as models write it, and as they should not: white space of all kinds, marks that combine, other scripts.
PLAIN = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\u00a0", "\x1c", "- 5", "+", "-", "1", "12", "1234", "Step 1: ", "So ",
         "x=\\frac{1}{2}", "$", ".", ".\n", "'s", "é", "e\u0301", "\u0301", "字", "ё", "😶\u200d🌫️", "\x00", "\ue000"]  # fmt: skip
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = ["ĠSo", "Step", "12", "Ġ=", "ĠĠ", "ĊĊ", "ĊĊĊ", ".Ċ", ".ĊĊ", "?Ċ", "Ġ+", "'s", "\\boxed"]


def check_prm_family(family: Any, tokenizer: Any, *, whole: Callable[[str, list[str]], list[int]] | None = None,
                     examples: int = 200, seed: int = 0) -> int:  # fmt: skip
    """Put a PRMFamily through the laws of PRMSpec on one tokenizer; the number of tokens in the paths it was asked for.

    whole: (problem, steps) -> the tokenizer's own ids of the whole text, where the family has one; a path's ids must be their
    beginning, for texts that spell no special token and no marker. A broken law is an AssertionError that shows the path.
    """
    spec, again = family.bind(tokenizer), family.bind(tokenizer)
    marker = prm_marker(spec)
    specials = {added.content: id for id, added in tokenizer.added_tokens_decoder.items()
                if added.special and id != tokenizer.unk_token_id}  # fmt: skip
    vocabulary = set(tokenizer.get_vocab().values())
    said = tokenizer.decode(marker).strip()
    control = [*specials, "\u2581", *([said] if said else [])]
    rng, num_tokens = random.Random(seed), 0
    paths = [("1 + 1?", ["", "\n", "a", said, f"{said}{said} a {said}", " a\n\n", "a " * 3000])]
    for number in range(examples):
        pieces = PLAIN if number % 2 else PLAIN + [said, f" {said}", rng.choice(control)]
        texts = ["".join(rng.choices(pieces, k=rng.randrange(8))) for _ in range(rng.randrange(2, 7))]
        paths.append((f"{texts[0]}?", texts[1:]))
    for problem, steps in paths:
        ids, positions = spec.render(problem, steps)
        shown = f"problem {problem!r:.200}, steps {steps!r:.500}"
        assert again.render(problem, steps) == (ids, positions), f"the same path reads otherwise the second time: {shown}"
        assert set(ids) <= vocabulary, f"ids that the vocabulary does not have: {shown}"
        _check_steps(spec, marker, set(specials.values()), problem, steps, shown)
        num_tokens += len(ids)
        if whole is not None and not any(text in part for text in control for part in (problem, *steps)):
            assert whole(problem, steps)[: len(ids)] == ids, f"not the ids of the whole text: {shown}"
    return num_tokens


def prm_marker(spec: Any) -> list[int]:
    """The ids that all steps of a PRMSpec share up to the read position; there must be some."""
    steps = [spec.step(text, first) for text in ("", "a", "7.") for first in (False, True)]
    ends = [ids[: len(ids) + spec.read_at + 1] for ids in steps]
    length = next((n for n in range(min(map(len, ends))) if len({ids[-1 - n] for ids in ends}) > 1), min(map(len, ends)))
    assert length, "steps share no marker up to the read position"
    return ends[0][-length:]


def _check_steps(spec: Any, marker: list[int], specials: set[int], problem: str, steps: list[str], shown: str) -> None:
    def control(ids: list[int]) -> list[int]:
        return [token for token in ids if token in specials]

    assert control(spec.opening(problem)) == control(spec.opening("a")), f"the problem's text became control: {shown}"
    fewer, read = spec.render(problem, [])
    for count in range(1, len(steps) + 1):
        more, positions = spec.render(problem, steps[:count])
        assert more[: len(fewer)] == fewer and positions[:-1] == read, f"step {count} changes what was read before it: {shown}"
        own, place = more[len(fewer) :], positions[-1] - len(fewer)
        found = [end for end in range(len(marker) - 1, len(own)) if own[end + 1 - len(marker) : end + 1] == marker]
        assert found == [place], f"step {count} holds the marker up to {found} and is read at {place}: {shown}"
        assert not control(own[place + 1 :]), f"something closes the text behind step {count}, before another comes: {shown}"
        assert control(own) == control(spec.step("", count == 1)), f"the text of step {count} became control: {shown}"
        fewer, read = more, positions


def tiny_tokenizer() -> Any:
    """A made-up byte-level BPE tokenizer of a few merges to which every PRM family can be bound; its chat shows a date."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from .prm.families import QWEN_BOS, QWEN_MARKER, SHEPHERD_TAG

    merges = dict.fromkeys((piece[: i - 1], piece[i - 1]) for piece in PIECES for i in range(2, len(piece) + 1))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = [*sorted(byte_level.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(vocab)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([QWEN_BOS, QWEN_MARKER, "<|turn|>", "<|end|>"])
    tokenizer.add_tokens([SHEPHERD_TAG])
    date = "<|turn|>{{ date_string or strftime_now('%d %b %Y') }}<|end|>\n"
    turn = "<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    template = f"{date}{{% for message in messages %}}{turn}{{% endfor %}}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template)
