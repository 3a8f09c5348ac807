"""The matrices of two decoders in every form, at the numbers of rows that a search has: what decides how they are kept.

COPIES of a matrix take turns, as in a model, so that no contender finds its weights in a core's own cache.
"""

import itertools

import pytest
import torch

from tts_engine.models.linear import Int8, Packed, Plain, Widened, quantise

pytestmark = pytest.mark.timeout(0)
COPIES = 4
ROWS = [1, 4, 16, 64, 256]
SHAPES = {  # N, K
    "Qwen2.5-0.5B qkv": (1152, 896),
    "Qwen2.5-0.5B out": (896, 896),
    "Qwen2.5-0.5B gate+up": (9728, 896),
    "Qwen2.5-0.5B down": (896, 4864),
    "Qwen2.5-0.5B lm_head": (151936, 896),
    "Llama-3.2-1B qkv": (3072, 2048),
    "Llama-3.2-1B out": (2048, 2048),
    "Llama-3.2-1B gate+up": (16384, 2048),
    "Llama-3.2-1B down": (2048, 8192),
    "Llama-3.2-1B lm_head": (128256, 2048),
}


def int8(weight):
    quantised, scales, sums = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight)), torch.empty(len(weight))
    quantise(weight.clone(), quantised, scales, sums)
    return Int8(quantised, scales, sums)


FORMS = {
    "float32": (Plain, torch.float32),
    "float32 packed": (Packed, torch.float32),
    "bfloat16": (Plain, torch.bfloat16),
    "bfloat16 packed": (Packed, torch.bfloat16),
    "bfloat16 widened": (Widened, torch.bfloat16),
}


@pytest.fixture(scope="module", params=SHAPES)
def matrices(request):
    """(name, N, K, form -> copies of a matrix and the dtype of its rows)."""
    rows, columns = SHAPES[request.param]
    weights = [torch.randn(rows, columns) * columns**-0.5 for _ in range(1 if rows > 100_000 else COPIES)]
    made = {"int8": ([int8(weight) for weight in weights], torch.bfloat16)}
    made |= {name: ([form(weight.to(dtype)) for weight in weights], dtype) for name, (form, dtype) in FORMS.items()}
    products = [torch.empty(weight.shape, dtype=torch.int8).random_(-127, 128).T for weight in weights]
    return request.param, rows, columns, made, products


@pytest.mark.parametrize("num_rows", ROWS)
def test_products(race, matrices, num_rows):
    """int8 makes its bytes and scales its rows; beside it, the integer product of PyTorch alone."""
    name, rows, columns, made, products = matrices
    x = torch.randn(num_rows, columns)

    def runner(turn, x):
        return lambda: next(turn)(x)

    contenders = {form: runner(itertools.cycle(linears), x.to(dtype)) for form, (linears, dtype) in made.items()}
    given, turn = torch.empty(num_rows, columns, dtype=torch.int8).random_(-127, 128), itertools.cycle(products)
    contenders["torch._int_mm, bare"] = lambda: torch._int_mm(given, next(turn))
    race(f"{name}, {num_rows} rows", contenders, gflop=2e-9 * num_rows * rows * columns)
