"""The next token of a branch: argmax of logit / T + Gumbel noise, the noise of a token from a counter, as tts_engine draws it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability

BLOCK = 1024  # tokens of one turn of a program
PIECE = 8 * BLOCK  # tokens of one program


@triton.jit
def words(counter, position, identity, key_0, key_1):
    """Philox4x32-10 of (counter [..., N], position, identity's low and high half) under a key, which broadcast against it: uint32
    [..., 4 N], four to a counter."""
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox_impl(counter, zero + position, zero + identity.to(tl.uint32), zero + (identity >> 32).to(tl.uint32),
                                    zero + key_0, zero + key_1)  # fmt: skip
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def noise(counter, position, identity, key_0, key_1):
    """Gumbel noise float32 [..., 4 N]: through double precision, as on every device."""
    uniform = (words(counter, position, identity, key_0, key_1).to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _sample(logits, rows, keys, identities, positions, best, best_token, temperature,
            VOCAB: tl.constexpr, STRIDE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    draw, piece = tl.program_id(0), tl.program_id(1)
    row = logits + tl.load(rows + draw) * STRIDE
    identity, position = tl.load(identities + draw), tl.load(positions + draw).to(tl.uint32)
    key_0, key_1 = tl.load(keys + 2 * draw).to(tl.uint32, bitcast=True), tl.load(keys + 2 * draw + 1).to(tl.uint32, bitcast=True)
    top, top_token = float("-inf"), piece * PIECE
    for i in range(0, PIECE, BLOCK):
        start = piece * PIECE + i
        token = start + tl.arange(0, BLOCK)
        counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        value = tl.load(row + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        score = tl.div_rn(value, temperature) + noise(counter, position, identity, key_0, key_1)
        found, place = tl.max(score, 0, return_indices=True)
        better = found > top
        top, top_token = tl.where(better, found, top), tl.where(better, start + place, top_token)
    at = draw * tl.num_programs(1) + piece
    tl.store(best + at, top)
    tl.store(best_token + at, top_token)


def prepare(logits: Tensor, rows: Tensor, keys: Tensor, identities: Tensor, positions: Tensor, best: Tensor, best_token: Tensor,
            temperature: float, *, capability: int) -> Launch:  # fmt: skip
    return Launch(
        kernel=_sample,
        grid=tuple(best.shape),
        arguments=dict(logits=logits, rows=rows, keys=keys, identities=identities, positions=positions, best=best,
                       best_token=best_token, temperature=temperature, VOCAB=logits.shape[1], STRIDE=logits.stride(0), PIECE=PIECE,
                       BLOCK=BLOCK),
        capability=capability,
    )  # fmt: skip


def sample(logits: Tensor, rows: Tensor, keys: Tensor, identities: Tensor, positions: Tensor, temperature: float) -> Tensor:
    """Token ids int64 [B] for draws from rows int64 [B] of logits [R, V]; several draws may share a row. temperature > 0.

    keys int32 [B, 2] and identities int64 [B] are the bits of unsigned numbers, positions int64 [B] places on the branches. The
    noise is the double-precision logarithm of the same 32-bit words on every device; of equal best tokens the first is drawn.
    """
    assert temperature > 0 and logits.stride(1) == 1 and keys.is_contiguous()
    shape = (len(rows), triton.cdiv(logits.shape[1], PIECE))
    best = torch.empty(shape, dtype=torch.float32, device=logits.device)
    token = torch.empty(shape, dtype=torch.int64, device=logits.device)
    prepare(logits, rows, keys, identities, positions, best, token, temperature, capability=capability(logits.device)).run()
    return token.gather(1, best.argmax(1, keepdim=True))[:, 0]
