"""What the parts of bench/gpu.py have in common: how large everything is, the models' shapes, and whom they tell what they find."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tts_engine.testing import tiny_tokenizer

from ..baselines.models import CHAT, FAMILY, SHAPE

Config = dict[str, Any]
LLAMA_1B: Config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
    "tie_word_embeddings": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
QWEN_7B: Config = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18_944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
    "tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "max_position_embeddings": 32_768,
    "use_sliding_window": False,
}  # fmt: skip
TINY_LLAMA = LLAMA_1B | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 512}  # fmt: skip
TINY_QWEN = QWEN_7B | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512}  # fmt: skip
QWEN_PRM = {"architectures": ["Qwen2ForProcessRewardModel"]}  # read by a head of its own
PAIR_PRM = {"prm_family": FAMILY}  # read from two entries of its vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Branches on a prompt, `shared` tokens of steps that several of them have in common, and `private` ones of their own."""

    branches: int
    prompt: int
    shared: int
    private: int
    levels: int  # nodes of every path


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Every number that a part needs. Heads are H, K, D."""

    dtype: torch.dtype  # of what is timed
    checked: tuple[torch.dtype, ...]
    heads: dict[str, tuple[int, int, int]]  # of what is timed
    odd_heads: tuple[tuple[int, int, int], ...]  # checked beside them
    trees: int  # random ones for each check
    nodes: int  # of theirs, at most
    longest: int  # tokens of a node, at most
    replays: int  # of one captured graph, a tree each
    pool: int  # elements of a pool too large for 32 bits
    vocab: int
    draws: int
    cold: int  # bytes between two readings of the same data
    copied: int  # bytes
    side: int  # of the product that tells what products can do
    rounds: int  # of one race, at least
    seconds: float  # the same
    tree: Tree
    levels: tuple[int, ...]  # of the trees on which levels are read one after the other
    unrelated: tuple[int, int]  # sequences, tokens of each
    few: tuple[Tree, ...]  # where sharing has little to give
    policies: dict[str, Config]  # held against transformers
    new: int  # tokens of a greedy text
    problems: int  # of the embedded task
    policy: Config
    prm: Config
    prefill: int  # new tokens of one forward of a PRM
    read: dict[int, int]  # branches that a PRM reads side by side: steps of their paths
    opening: int  # tokens before the first step
    step: int  # tokens
    search: tuple[int, int, int]  # n, steps, tokens of a step
    beside: int  # problems that share such an n, so that one may be read while others are drawn
    ticks: tuple[int, int]  # tokens of a shorter and a longer step: a tick is what they differ by


FULL = Sizes(
    dtype=torch.bfloat16,
    checked=(torch.bfloat16, torch.float16, torch.float32),
    heads={"1B": (32, 8, 64), "7B": (28, 4, 128)},
    odd_heads=((14, 2, 64), (3, 1, 32), (5, 1, 16)),
    trees=4,
    nodes=40,
    longest=300,
    replays=50,
    pool=(1 << 31) + (1 << 26),
    vocab=128_256,
    draws=64,
    cold=200 << 20,
    copied=2 << 30,
    side=8192,
    rounds=3,
    seconds=1.0,
    tree=Tree(branches=256, prompt=512, shared=1638, private=410, levels=19),
    levels=(8, 17),
    unrelated=(16, 2560),
    few=(
        Tree(branches=2, prompt=128, shared=0, private=64, levels=2),
        Tree(branches=4, prompt=128, shared=0, private=64, levels=2),
        Tree(branches=2, prompt=2048, shared=0, private=64, levels=2),
        Tree(branches=4, prompt=2048, shared=0, private=64, levels=2),
        Tree(branches=256, prompt=32, shared=0, private=128, levels=2),
    ),
    policies={"Llama-3.2-1B": LLAMA_1B, "Qwen2.5-0.5B": SHAPE},
    new=32,
    problems=20,
    policy=LLAMA_1B,
    prm=QWEN_7B,
    prefill=4096,
    read={32: 10, 16: 20},
    opening=300,
    step=100,
    search=(256, 10, 50),
    beside=8,
    ticks=(16, 80),
)
TINY = Sizes(
    dtype=torch.float32,
    checked=(torch.float32,),
    heads={"1B": (3, 1, 16)},
    odd_heads=(),
    trees=1,
    nodes=5,
    longest=9,
    replays=2,
    pool=1 << 15,
    vocab=300,
    draws=3,
    cold=0,
    copied=1 << 10,
    side=16,
    rounds=1,
    seconds=0.0,
    tree=Tree(branches=8, prompt=12, shared=12, private=6, levels=5),
    levels=(4,),
    unrelated=(2, 9),
    few=(Tree(branches=2, prompt=5, shared=0, private=2, levels=2),),
    policies={"Llama": TINY_LLAMA, "Qwen": TINY_QWEN},
    new=3,
    problems=1,
    policy=TINY_LLAMA,
    prm=TINY_QWEN,
    prefill=60,
    read={2: 2},
    opening=40,
    step=20,
    search=(8, 2, 5),
    beside=2,
    ticks=(2, 4),
)
# As much of FULL's kernels as a tool bears that makes them a hundred times slower.
SANITIZED = replace(
    TINY, dtype=torch.bfloat16, checked=(torch.bfloat16,), heads=FULL.heads, odd_heads=FULL.odd_heads[1:2], longest=70, draws=5,
    vocab=9000,
)  # fmt: skip
SIZES = {"full": FULL, "tiny": TINY, "sanitized": SANITIZED}


class Wrong(AssertionError):
    """Some of a part's checks have failed."""


class Bench:
    """What one part is given: where and how large it runs, and who is told.

    told: takes events, plain dicts: `row`s of any columns, `figure`s, and of checks the failed ones.
    """

    def __init__(self, device: str, sizes: Sizes, directory: Path, told: Callable[[dict[str, Any]], None],
                 deadline: float = float("inf")) -> None:  # fmt: skip
        """directory: room for files; deadline: of time.monotonic(), behind which nothing new should begin."""
        self.device, self.sizes, self.directory, self.deadline = torch.device(device), sizes, directory, deadline
        self._told, self._checks, self._failed = told, 0, list[str]()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """Whose attention engines are given."""
        return "triton_tree" if self.on_gpu else "native"

    @property
    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, case: str, **columns: Any) -> None:
        self._told({"event": "row", "case": case} | columns)

    def figure(self, name: str, case: str, value: float, **columns: Any) -> None:
        self._told({"event": "figure", "name": name, "case": case, "value": value} | columns)

    def check(self, case: str, run: Callable[[], dict[str, Any] | None]) -> None:
        """Whether `run` passes; the others go on where it does not. What it returns becomes columns of its row."""
        self._checks += 1
        try:
            columns = run() or {}
        except Exception:
            self._failed.append(case)
            self._told({"event": "failed check", "case": case, "error": traceback.format_exc()})
        else:
            self.row(case, **columns)

    def settle(self) -> None:
        """Raise Wrong where a check has failed."""
        if self._failed:
            raise Wrong(f"{len(self._failed)} of {self._checks} checks failed: {', '.join(self._failed)}")

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def model(self, name: str, *configs: Config) -> Path:
        """A directory with a config and a made-up tokenizer, to be loaded with random weights."""
        path = self.directory / name
        if not path.exists():
            tokenizer = tiny_tokenizer()
            tokenizer.chat_template = CHAT
            tokenizer.save_pretrained(path)
            merged: Config = {}
            for config in configs:
                merged |= config
            (path / "config.json").write_text(json.dumps(merged))
        return path


def root_mean_square(error: torch.Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def near(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, most: float) -> dict[str, Any]:
    """Raise AssertionError unless `got` is as near to float64's `exact` as `plain`, PyTorch's own in the same dtype, 1.5 times
    allowed, and no element is further off than `most` of the largest."""
    assert got.shape == exact.shape, f"shape {list(got.shape)} for {list(exact.shape)}"
    assert bool(got.isfinite().all()), "what came out is not finite everywhere: poison was read, or not all was written"
    error, yardstick = root_mean_square(got - exact), root_mean_square(plain - exact)
    worst = float((got.double() - exact).abs().max() / exact.abs().max())
    floor = 1e-6 * float(exact.abs().max())
    assert error <= max(1.5 * yardstick, floor), f"error {error:.3g} where plain PyTorch has {yardstick:.3g}"
    assert worst <= most, f"one element is off by {worst:.3g} of the largest, {most:.3g} allowed"
    return {"error": error, "plain": yardstick, "worst": worst}


def most_off(dtype: torch.dtype) -> float:
    """What one element may be off by, as a share of the largest: a few roundings of the dtype."""
    return 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
