"""Draws without logits against the definition of sampling over the decoder's logits."""

import numpy as np
import pytest
import torch

from tts_engine.sampling import Sampling, philox_key, sample_slowly
from tts_kernels.lm_head_sample import lm_head_sample


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
    logits = (hidden.double() @ weight.double().T).to(dtype).float()
    expected = sample_slowly(logits, rows, Sampling(temperature=0.9), keys, identities, positions)
    given = (torch.from_numpy(x) for x in (rows, keys.view(np.int32), identities.view(np.int64), positions))
    got = lm_head_sample(hidden, weight, *given, 0.9)
    assert got.tolist() == expected.tolist() and len(set(got.tolist())) > 1
