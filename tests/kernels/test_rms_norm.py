"""Norms of rows and of heads against the definition."""

import pytest
import torch

from tts_engine.models.ops import TorchOps
from tts_kernels.rms_norm import rms_norm

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3}  # of the size of an element: an order of summation, or two roundings


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 896), (2, 2049), (1, 1, 8), (4, 3, 10), (3, 7, 64)], ids=str)
def test_rows_and_heads_within_wider_rows_are_normed_as_defined(shape, dtype):
    gen = torch.Generator().manual_seed(shape[-1])
    x = torch.full((shape[0], *(n + 2 for n in shape[1:-1]), shape[-1] + 4 * (len(shape) == 2)), torch.nan)
    x[:, : shape[1]] = torch.randn(shape, generator=gen) * torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x, weight = x.to(dtype)[:, : shape[1]], torch.randn(shape[1:], generator=gen).to(dtype)
    out, ref = rms_norm(x, weight, 1e-5), TorchOps().norm(x, weight, 1e-5)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out, ref, rtol=BOUNDS[dtype], atol=0)


def test_no_row_is_no_launch():
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
