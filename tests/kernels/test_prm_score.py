"""Scores read by the kernel against the heads' own definitions, behind the decoder's norm."""

import pytest
import torch

from tts_engine.models.heads import PairHead, TwoClassHead, ValueHead
from tts_engine.models.ops import TorchOps
from tts_kernels.prm_score import prm_score


@pytest.mark.parametrize("width", [32, 37, 896])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scores_are_the_heads(width, dtype):
    gen = torch.Generator().manual_seed(width)
    states, weights = (3 * torch.randn(9, width + 3, generator=gen)).to(dtype)[:, :width], torch.randn(3, width, generator=gen)
    norm = torch.randn(width, generator=gen).to(dtype)
    at = torch.tensor([8, 0, 3, 3])
    poisoned = states.clone()
    poisoned[[1, 2, 4, 5, 6, 7]] = torch.nan  # rows that no score is read from
    weights /= width**0.5
    hidden = TorchOps().norm(states, norm, 1e-5)[at]
    pair, value = PairHead(weights[0], weights[1]), ValueHead(weights[:1], torch.tensor([0.3]))
    got = prm_score(poisoned, at, weights[0] - weights[1], norm=norm, epsilon=1e-5)
    torch.testing.assert_close(got, pair(hidden), atol=2e-6 if dtype == torch.float32 else 2e-3, rtol=0)
    got = prm_score(poisoned, at, weights[0].contiguous(), norm=norm, epsilon=1e-5, offset=0.3)
    torch.testing.assert_close(got, value(hidden), atol=2e-6 if dtype == torch.float32 else 2e-3, rtol=0)


def test_the_tail_of_two_classes_is_read_behind_their_hidden_layer():
    gen = torch.Generator().manual_seed(0)
    hidden, layer = torch.randn(5, 24, generator=gen), torch.randn(24, 24, generator=gen) / 5
    bias, rows, biases = (torch.randn(*shape, generator=gen) for shape in ((24,), (2, 24), (2,)))
    inner = torch.nn.functional.linear(hidden, layer, bias)
    got = prm_score(inner, torch.arange(5), rows[1] - rows[0], offset=float(biases[1] - biases[0]), relu=True)
    torch.testing.assert_close(got, TwoClassHead(layer, bias, rows, biases)(hidden), atol=2e-6, rtol=0)


def test_no_row_is_no_score():
    assert prm_score(torch.zeros(2, 8), torch.zeros(0, dtype=torch.int64), torch.zeros(8)).shape == (0,)
    assert prm_score(torch.zeros(0, 8), None, torch.zeros(8)).shape == (0,)


def test_all_rows_are_read_where_none_is_named():
    gen = torch.Generator().manual_seed(1)
    x, direction = torch.randn(7, 40, generator=gen)[:, :33], torch.randn(33, generator=gen)
    out = prm_score(x, None, direction, offset=-0.5)
    assert torch.equal(out, prm_score(x, torch.arange(7), direction, offset=-0.5)) and len(set(out.tolist())) == 7
