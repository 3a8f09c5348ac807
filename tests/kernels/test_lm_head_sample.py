"""Draws without logits against the definition of sampling over the decoder's logits."""

import numpy as np
import pytest
import torch

from tts_engine.sampling import Sampling, log_probabilities, philox_key, sample_slowly
from tts_kernels import lm_head_sample as kernels
from tts_kernels.lm_head_sample import lm_head_sample
from tts_kernels.sample import sample


@pytest.mark.parametrize(("draws", "vocab"), [(3, 130), (17, 77)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tokens_are_those_of_logits_written_out(draws, vocab, dtype):
    gen = torch.Generator().manual_seed(draws)
    hidden, weight = torch.randn(5, 128, generator=gen).to(dtype), (torch.randn(vocab, 128, generator=gen) / 4).to(dtype)
    hidden[2] = torch.nan  # nobody's row
    rng = np.random.default_rng(draws)
    rows = rng.choice([0, 1, 3, 4], draws)
    keys = np.array([philox_key(i, "a problem") for i in range(draws)], np.uint32)
    identities, positions = rng.integers(0, 2**64, draws, np.uint64, endpoint=False), rng.integers(0, 5000, draws)
    temperatures = np.array([0.9, 0.0, 2.0])[np.arange(draws) % 3]
    logits = (hidden.double() @ weight.double().T).to(dtype).float()
    expected = [
        sample_slowly(logits, rows[[i]], Sampling(temperature=t), keys[[i]], identities[[i]], positions[[i]])[0]
        for i, t in enumerate(temperatures)
    ]
    columns = rows, keys.view(np.int32), identities.view(np.int64), positions, np.float32(temperatures)
    given = [torch.from_numpy(column) for column in columns]
    tokens, logprobs = torch.full((draws,), -7), torch.full((draws,), torch.nan)
    partial = torch.full((5, draws, kernels.num_tiles(vocab)), torch.nan)
    got = lm_head_sample(hidden, weight, *given, tokens=tokens, logprobs=logprobs, partial=partial)
    assert got is tokens and got.tolist() == expected and len(set(expected)) > 1
    assert sample(logits, *given).tolist() == expected
    ref = log_probabilities(logits[[0, 1, 1, 3, 4]], rows, np.array(expected))
    np.testing.assert_allclose(logprobs, ref, atol=2e-5, rtol=1e-6)


def test_no_token_is_drawn_behind_a_state_that_is_broken():
    hidden, weight = torch.ones(3, 64), torch.ones(70, 64)
    hidden[1, 5] = torch.nan
    given = torch.arange(3), torch.zeros(3, 2, dtype=torch.int32), torch.arange(3), torch.arange(3), torch.tensor([1.0, 1.0, 0.0])
    got = lm_head_sample(hidden, weight, *given, logprobs=(logprobs := torch.zeros(3)))
    assert got[1] == -1 and got[0] >= 0 and got[2] == 0
    assert logprobs.isnan().tolist() == [False, True, False]
    assert lm_head_sample(hidden, weight, *(x[:0] for x in given)).shape == (0,)
