"""Which token comes next: exact counter-based Gumbel sampling.

The next token of a branch is argmax over v of logit_v / T + Gumbel(u_v), u_v = Philox4x32-10 under key (seed, problem) at counter
(v // 4, position, child identity), word v % 4 (Salmon et al. 2011). So a token depends on its branch and its logits, never on the
batch, the device or the order of work. T = 0 is greedy. `sample_slowly` is the definition, in numpy; `sample` is what runs.

Top-k, top-p and min-p rule tokens out before that, in this order, each among those that are left, as transformers does. They look
at logit_v / T in float32, of equal ones the first counts as likelier, and at probabilities in whole units of 2^-32 of the
likeliest's: what is kept does not hang on an order of summation, so it is the same on every device.
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
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 restrict nothing.

    top_k: so many of the likeliest tokens are kept. top_p: of those the fewest likeliest that together have this share of their
    probability. min_p: of those the ones at least this fraction as likely as the likeliest. Where it counts they are float32.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be >= 0; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]")

    @property
    def restricts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


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

    -1 is drawn from a row that has NaN, +inf or nothing finite. On a CPU a token whose logit is too far below its row's best for
    any 32-bit noise to lift it gets no random number.
    """
    given = zip((rows, keys, identities, positions), DRAW_DTYPES, strict=True)
    columns = [np.ascontiguousarray(column, dtype) for column, dtype in given]
    if not logits.is_cpu:
        return _sample_on_gpu(logits, sampling, columns)
    if sampling.temperature == 0:
        return sample_slowly(logits, rows, sampling, keys, identities, positions)
    if sampling.restricts:
        logits = logits.masked_fill(_restrict(logits / sampling.temperature, sampling).isneginf(), float("-inf"))
    logits = logits.contiguous()
    return _C.sample(logits.data_ptr(), *logits.shape, sampling.temperature, *columns, torch.get_num_threads())


def sample_slowly(logits: Tensor, rows: np.ndarray, sampling: Sampling, keys: np.ndarray, identities: np.ndarray,
                  positions: np.ndarray) -> np.ndarray:  # fmt: skip
    """What `sample` must return. Always computed on the CPU."""
    logits = logits.cpu()[torch.from_numpy(rows)]
    scores = logits
    if sampling.temperature > 0:
        scores = logits / sampling.temperature
        if sampling.restricts:
            scores = _restrict(scores, sampling)
        scores = scores + torch.from_numpy(gumbel(keys, identities, positions, logits.shape[-1]))
    return scores.argmax(dim=-1).where(logits.amax(dim=-1).isfinite(), -1).numpy()


def log_probabilities(logits: Tensor, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float32 [B], of tokens int64 [B] behind rows int64 [B] of logits float32 [R, V]; NaN for token -1.

    At temperature 1 and with nothing ruled out, however they were drawn.
    """
    known = logits.cpu().double().log_softmax(dim=-1).numpy()[rows, tokens]
    return np.where(tokens < 0, np.nan, known).astype(np.float32)


def _sample_on_gpu(logits: Tensor, sampling: Sampling, columns: list[np.ndarray]) -> np.ndarray:
    """The same by kernels; the host waits for the tokens alone."""
    from tts_kernels import sample as kernels

    count, device = len(columns[0]), logits.device
    packed = torch.empty(len(columns), count, dtype=torch.int64, pin_memory=device.type == "cuda")
    for place, column in zip(packed.numpy(), columns, strict=True):
        place[:] = column.reshape(-1).view(np.int64)
    rows, keys, identities, positions = packed.to(device, non_blocking=True)
    limits = []
    if sampling.restricts:
        settings = ((sampling.top_k, torch.int32), (sampling.top_p, torch.float32), (sampling.min_p, torch.float32))
        limits = [torch.full((count,), value, dtype=dtype, device=device) for value, dtype in settings]
    temperatures = torch.full((count,), sampling.temperature, dtype=torch.float32, device=device)
    given = rows, keys.view(torch.int32).view(count, 2), identities, positions, temperatures
    return kernels.sample(logits, *given, *limits).numpy(force=True)


def _restrict(scaled: Tensor, sampling: Sampling) -> Tensor:
    """-inf wherever a token of scaled float32 [..., V], logits / T, is ruled out."""
    ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
    keep, best = torch.ones_like(ordered, dtype=torch.bool), ordered[..., :1].double()
    if sampling.top_k:
        keep[..., sampling.top_k :] = False
    if (share := np.float32(sampling.top_p)) < 1:
        weight = torch.floor((ordered.double() - best).exp() * 2.0**32 + 0.5) * keep
        total = weight.cumsum(dim=-1)  # whole numbers far below 2^53: exact
        keep &= total - weight < float(share) * total[..., -1:]
    if sampling.min_p:
        keep &= ordered >= (best + np.log(np.float64(np.float32(sampling.min_p)))).float()
    return scaled.masked_fill(~torch.zeros_like(keep).scatter(-1, index, keep), float("-inf"))
