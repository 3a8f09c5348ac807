"""A GPU's row operations in captured graphs: a Triton launch against what PyTorch launches for the same, at the rows of a tick.

What is slower here than its definition has no place in TritonOps. Skipped without a GPU; nothing of it has been measured yet.
"""

from collections.abc import Callable

import pytest
import torch

from tts_engine.kv.cache import KVCache
from tts_engine.models.ops import Ops, TorchOps, TritonOps

pytestmark = [pytest.mark.timeout(0), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SHAPES = {"Llama-3.2-1B": (2048, 8192, 32, 8, 64), "Qwen2.5-7B": (3584, 18944, 28, 4, 128)}  # d, I, H, K, D
ROWS = (64, 256)
LAUNCHES = 64  # of one graph, so that its own launch costs little

Turn = Callable[[int], object]  # does the work once, with the data of that turn


def contenders(shape: tuple[int, int, int, int, int], rows: int, device: torch.device | str = "cuda", *, turns: int = 8,
               dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, Turn]]:  # fmt: skip
    """By operation and by who does it. `turns` inputs take turns, as in a model every layer has its own."""
    hidden, inner, heads, kv_heads, dim = shape

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(turns, *size, device=device).to(dtype)

    x, gate_up, qkv = drawn(rows, hidden), drawn(rows, 2 * inner), drawn(rows, heads + 2 * kv_heads, dim)
    weight, of_heads = drawn(hidden)[0], drawn(heads + kv_heads, dim)[0]
    angles = torch.randn(rows, dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(rows, device=device)
    cache = KVCache(
        num_layers=turns, num_blocks=rows, block_size=1, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype, device=device
    )

    def enter(ops: Ops, norm: torch.Tensor | None, turn: int) -> None:
        layer = turn % turns
        _, k, v = ops.enter(qkv[layer], norm, 1e-6, cos, sin, cache, layer, slots)
        if k is not None and v is not None:
            cache.write(layer, slots, k, v)

    def of(ops: Ops) -> dict[str, Turn]:
        return {
            "norm": lambda turn: ops.norm(x[turn % turns], weight, 1e-6),
            "heads to attention": lambda turn: enter(ops, None, turn),
            "heads to attention, normed": lambda turn: enter(ops, of_heads, turn),
            "swiglu": lambda turn: ops.swiglu(gate_up[turn % turns]),
            "rows of 8-bit floats": lambda turn: ops.fp8_rows(x[turn % turns]),
        }

    ours, theirs = of(TritonOps()), of(TorchOps())
    return {name: {"Triton": turn, "PyTorch": theirs[name]} for name, turn in ours.items()}


def captured(turn: Turn) -> Callable[[], None]:
    """LAUNCHES turns in one graph; called, it waits until they are done."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        turn(0)  # kernels are compiled before anything is recorded
    aside.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(LAUNCHES):
            turn(number)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_launches(race, shape, rows):
    """Milliseconds are of LAUNCHES turns."""
    for name, by in contenders(SHAPES[shape], rows).items():
        race(f"{shape}, {rows} rows: {name}", {who: captured(turn) for who, turn in by.items()})
