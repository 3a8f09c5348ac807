"""Which token comes next: exact counter-based Gumbel sampling.

The next token of a branch is argmax over v of logit_v / T + Gumbel(u_v), u_v = Philox4x32-10 under key (seed, problem) at counter
(v // 4, position, child identity), word v % 4 (Salmon et al. 2011). So a token depends on its branch and its logits, never on the
batch, the device or the order of work. T = 0 is greedy. `sample_slowly` is the definition, in numpy; `sample` is what runs.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
DRAW_DTYPES = (np.int64, np.uint32, np.uint64, np.int64)  # of rows, keys, identities, positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 restrict nothing."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be >= 0; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


def philox_key(seed: int, problem_id: str) -> tuple[int, int]:
    """The two 32-bit key words of one problem under one seed."""
    digest = hashlib.blake2b(f"{seed}/{problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10. counter uint32 [..., 4], key uint32 [..., 2] (broadcast) -> uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key[..., 0].astype(np.uint64), key[..., 1].astype(np.uint64)
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & _LOW, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def gumbel(keys: np.ndarray, identities: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """Gumbel noise float32 [B, V] for rows with keys uint32 [B, 2], identities uint64 [B] and positions [B] on their path."""
    num_rows, num_blocks = len(positions), -(-vocab_size // 4)
    counter = np.empty((num_rows, num_blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(num_blocks, dtype=np.uint32)
    counter[..., 1] = positions.astype(np.uint32)[:, None]
    counter[..., 2] = (identities & _LOW).astype(np.uint32)[:, None]
    counter[..., 3] = (identities >> np.uint64(32)).astype(np.uint32)[:, None]
    words = philox(counter, keys[:, None, :]).reshape(num_rows, 4 * num_blocks)[:, :vocab_size]
    uniform = (words + 0.5) * 2.0**-32  # float64, strictly inside (0, 1)
    return (-np.log(-np.log(uniform))).astype(np.float32)


def sample(logits: Tensor, rows: np.ndarray, sampling: Sampling, keys: np.ndarray, identities: np.ndarray,
           positions: np.ndarray) -> np.ndarray:  # fmt: skip
    """Token ids int64 [B] for draws from rows int64 [B] of logits float32 [R, V]; several draws may share a row (see `gumbel`).

    On a CPU a token whose logit is too far below the row's best for any 32-bit noise to lift it gets no random number.
    """
    if sampling.temperature == 0 or logits.device.type != "cpu":
        return sample_slowly(logits, rows, sampling, keys, identities, positions)
    if sampling.top_k or sampling.top_p < 1:
        logits = logits.masked_fill(_restrict(logits / sampling.temperature, sampling).isneginf(), float("-inf"))
    logits, given = logits.contiguous(), zip((rows, keys, identities, positions), DRAW_DTYPES, strict=True)
    columns = (np.ascontiguousarray(column, dtype) for column, dtype in given)
    return _C.sample(logits.data_ptr(), *logits.shape, sampling.temperature, *columns, torch.get_num_threads())


def sample_slowly(logits: Tensor, rows: np.ndarray, sampling: Sampling, keys: np.ndarray, identities: np.ndarray,
                  positions: np.ndarray) -> np.ndarray:  # fmt: skip
    """What `sample` must return."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).numpy(force=True)[rows]
    scaled = logits[torch.from_numpy(rows).to(logits.device)] / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        scaled = _restrict(scaled, sampling)
    noise = torch.from_numpy(gumbel(keys, identities, positions, logits.shape[-1])).to(logits.device)
    return (scaled + noise).argmax(dim=-1).numpy(force=True)


def _restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """-inf wherever top-k, or then top-p (the smallest set of likeliest tokens left whose mass reaches p), rules a token out."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[..., sampling.top_k :] = False
    if sampling.top_p < 1:
        mass = ordered.masked_fill(~keep, float("-inf")).softmax(dim=-1)
        keep &= mass.cumsum(dim=-1) - mass < sampling.top_p
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, index, keep), float("-inf"))
