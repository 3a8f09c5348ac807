"""The next token of a branch: argmax of logit / T + Gumbel noise, the noise of a token from a counter, as tts_engine draws it.

Top-k, top-p and min-p need no order of the vocabulary: each keeps a token by what is ahead of it, so the token that won among all
is looked at first, and only where it was ruled out is there another round, among the tokens ahead of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability

BLOCK = 1024  # tokens of one turn of a program
PIECE = 8 * BLOCK  # tokens of one program
CHOICE_BLOCK = 1024  # tokens of one turn where a whole row is looked through
MOST_TOKENS = 1 << 21  # of a vocabulary: all weights together, 2^32 each, are a whole number that a double holds

# What a program leaves of its piece, by plane of `partial`: the best score, its token (a whole number; -1 where there is none),
# that token's logit, the largest logit, and the sum of exp(logit - largest).
SCORE, TOKEN, LOGIT, PEAK, MASS = (tl.constexpr(i) for i in range(5))
PLANES = 5


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
def unfit(logit):
    """1 where a logit is no number a token could be drawn by: NaN, or infinite and not -inf, which rules a token out."""
    return ((logit != logit) | (logit == float("inf"))).to(tl.int32)


@triton.jit
def _load(row, token, VOCAB: tl.constexpr):
    return tl.load(row + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def _noise(start, keys, identities, positions, draw, BLOCK: tl.constexpr):
    """Of one draw's tokens from `start`, a multiple of 4, on: float32 [BLOCK]."""
    identity, position = tl.load(identities + draw), tl.load(positions + draw).to(tl.uint32)
    key_0, key_1 = tl.load(keys + 2 * draw).to(tl.uint32, bitcast=True), tl.load(keys + 2 * draw + 1).to(tl.uint32, bitcast=True)
    return noise((start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32), position, identity, key_0, key_1)


@triton.jit
def _sample(logits, rows, keys, identities, positions, temperatures, partial, STRIDE: tl.constexpr, VOCAB: tl.constexpr,
            PIECE: tl.constexpr, BLOCK: tl.constexpr, LOGPROB: tl.constexpr):  # fmt: skip
    draw, piece = tl.program_id(0), tl.program_id(1)
    row = logits + tl.load(rows + draw) * STRIDE
    temperature = tl.load(temperatures + draw)
    top, top_token, top_logit, peak, mass, broken = float("-inf"), -1, float("-inf"), float("-inf"), 0.0, 0
    for start in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, VOCAB), BLOCK):
        logit = _load(row, start + tl.arange(0, BLOCK), VOCAB)
        broken = tl.maximum(broken, tl.max(unfit(logit), 0))
        score = logit
        if temperature > 0:
            score = tl.div_rn(logit, temperature) + _noise(start, keys, identities, positions, draw, BLOCK)
        found, place = tl.max(score, 0, return_indices=True)
        better = found > top
        its_logit = tl.max(tl.where(tl.arange(0, BLOCK) == place, logit, float("-inf")), 0)
        top, top_token = tl.where(better, found, top), tl.where(better, start + place, top_token)
        top_logit = tl.where(better, its_logit, top_logit)
        if LOGPROB:
            new_peak = tl.maximum(peak, tl.max(logit, 0))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            mass = mass * tl.exp(peak - base) + tl.sum(tl.exp(logit - base), 0)
            peak = new_peak
        else:
            peak = tl.maximum(peak, tl.max(logit, 0))
    leave(partial, draw * tl.num_programs(1) + piece, tl.num_programs(0) * tl.num_programs(1), broken, top, top_token, top_logit,
          peak, mass, True)  # fmt: skip


@triton.jit
def leave(partial, at, plane, broken, top, top_token, top_logit, peak, mass, live):
    """Write what a program found to `at` of every plane of `partial`; what is `broken` wins over all, and is no token."""
    tl.store(partial + SCORE * plane + at, tl.where(broken > 0, float("inf"), top), mask=live)
    tl.store(partial + TOKEN * plane + at, tl.where(broken > 0, -1, top_token).to(tl.float32), mask=live)
    tl.store(partial + LOGIT * plane + at, top_logit, mask=live)
    tl.store(partial + PEAK * plane + at, peak, mask=live)
    tl.store(partial + MASS * plane + at, mass, mask=live)


@triton.jit
def _weight(x, best):
    """exp(x - best) in units of 2^-32, a whole number: sums of them are exact in any order."""
    return tl.floor(tl.exp(x.to(tl.float64) - best.to(tl.float64)) * 4294967296.0 + 0.5).to(tl.int64)


@triton.jit
def _rank(x):
    """Bits uint32 in the order of the numbers; 0 and -0 are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) > 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _kth(row, temperature, k, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest logit / T of a row, found a byte of its bits at a time, and how many of its equals the first k have."""
    digits = tl.arange(0, 256)
    known, left = tl.zeros((), tl.uint32), k
    for turn in tl.static_range(4):
        shift = 24 - 8 * turn
        counts = tl.zeros([256], tl.int32)
        for start in range(0, VOCAB, BLOCK):
            token = start + tl.arange(0, BLOCK)
            rank = _rank(tl.div_rn(_load(row, token, VOCAB), temperature))
            alike = (token < VOCAB) & (((rank ^ known) >> shift) < 256)  # in what is known of the bits
            counts += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=alike)
        from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where(from_here >= left, digits, 0), 0)
        left -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        known |= digit.to(tl.uint32) << shift
    bits = tl.where((known >> 31) > 0, known ^ 0x80000000, known ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True), left


@triton.jit
def _choose(logits, rows, keys, identities, positions, temperatures, top_k, top_p, min_p, partial, tokens, logprobs,
            STRIDE: tl.constexpr, VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
            RESTRICT: tl.constexpr, LOGPROB: tl.constexpr):  # fmt: skip
    draw = tl.program_id(0)
    plane = tl.num_programs(0) * PARTS
    part = tl.arange(0, PARTS_BLOCK)
    known, at = part < PARTS, partial + draw * PARTS
    _, place = tl.max(tl.load(at + SCORE * plane + part, mask=known, other=float("-inf")), 0, return_indices=True)
    token, logit = tl.load(at + TOKEN * plane + place).to(tl.int32), tl.load(at + LOGIT * plane + place)
    peaks = tl.load(at + PEAK * plane + part, mask=known, other=float("-inf"))
    peak = tl.max(peaks, 0)
    if RESTRICT:
        row = logits + tl.load(rows + draw) * STRIDE
        temperature = tl.load(temperatures + draw)
        k, p, least = tl.load(top_k + draw), tl.load(top_p + draw), tl.load(min_p + draw)
        if (token >= 0) & (temperature > 0) & ((k > 0) | (p < 1) | (least > 0)):
            best = tl.div_rn(peak, temperature)
            lowest = float("-inf")
            if least > 0:
                lowest = (best.to(tl.float64) + tl.log(least.to(tl.float64))).to(tl.float32)
            # Top-p shares out what top-k has left: what is above the k-th, and as many of its equals as are among the first k.
            cut, equals = tl.full((), float("-inf"), tl.float32), 0
            if (k > 0) & (p < 1):
                cut, equals = _kth(row, temperature, tl.minimum(k, VOCAB), VOCAB, BLOCK)
            kept = False
            while not kept:
                x = tl.div_rn(tl.load(row + token).to(tl.float32), temperature)
                ahead, ahead_weight = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int64)
                whole = tl.zeros([BLOCK], tl.int64)
                top, top_token = float("-inf"), -1
                for start in range(0, VOCAB, BLOCK):
                    other = start + tl.arange(0, BLOCK)
                    value = tl.div_rn(_load(row, other, VOCAB), temperature)
                    before = (value > x) | ((value == x) & (other < token))
                    ahead += before.to(tl.int32)
                    if p < 1:
                        weight = _weight(value, best)
                        ahead_weight += tl.where(before, weight, 0)
                        whole += tl.where(value > cut, weight, 0)
                    if tl.max(before.to(tl.int32), 0) > 0:  # few blocks have any, unless the token is a rare one
                        score = value + _noise(start, keys, identities, positions, draw, BLOCK)
                        found, where = tl.max(tl.where(before & (value >= lowest), score, float("-inf")), 0, return_indices=True)
                        better = found > top
                        top, top_token = tl.where(better, found, top), tl.where(better, start + where, top_token)
                share = tl.sum(whole, 0) + equals * _weight(cut, best)
                within = (p >= 1) | (tl.sum(ahead_weight, 0).to(tl.float64) < p.to(tl.float64) * share.to(tl.float64))
                kept = within & ((k <= 0) | (tl.sum(ahead, 0) < k)) & (x >= lowest)
                token = tl.where(kept, token, top_token)
            logit = tl.load(row + token).to(tl.float32)
    tl.store(tokens + draw, token.to(tl.int64))
    if LOGPROB:
        # In the order of the pieces, whoever asks.
        fade = tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak))
        mass = tl.sum(tl.load(at + MASS * plane + part, mask=known, other=0.0) * fade, 0)
        tl.store(logprobs + draw, tl.where(token < 0, float("nan"), logit - peak - tl.log(mass)))


def prepare(logits: Tensor, rows: Tensor, keys: Tensor, identities: Tensor, positions: Tensor, temperatures: Tensor,
            partial: Tensor, *, logprob: bool, capability: int) -> Launch:  # fmt: skip
    return Launch(
        kernel=_sample,
        grid=tuple(partial.shape[1:]),
        arguments=dict(logits=logits, rows=rows, keys=keys, identities=identities, positions=positions, temperatures=temperatures,
                       partial=partial, STRIDE=logits.stride(0), VOCAB=logits.shape[1], PIECE=PIECE, BLOCK=BLOCK, LOGPROB=logprob),
        capability=capability,
    )  # fmt: skip


def prepare_choice(partial: Tensor, tokens: Tensor, logprobs: Tensor | None, logits: Tensor | None = None,
                   given: tuple[Tensor, ...] = (), limits: tuple[Tensor, ...] = (), *, capability: int) -> Launch:  # fmt: skip
    """What is left of every piece -> tokens; `given`, the columns of _sample, and `limits` only where draws are restricted."""
    _, draws, parts = partial.shape
    names = ("rows", "keys", "identities", "positions", "temperatures", "top_k", "top_p", "min_p")
    columns = dict(zip(names, (*given, *limits) if limits else (tokens,) * len(names), strict=True))
    return Launch(
        kernel=_choose,
        grid=(draws,),
        arguments=dict(logits=partial if logits is None else logits, **columns, partial=partial, tokens=tokens,
                       logprobs=partial if logprobs is None else logprobs, STRIDE=0 if logits is None else logits.stride(0),
                       VOCAB=0 if logits is None else logits.shape[1], PARTS=parts, PARTS_BLOCK=triton.next_power_of_2(parts),
                       BLOCK=CHOICE_BLOCK, RESTRICT=bool(limits), LOGPROB=logprobs is not None),
        capability=capability,
        num_warps=8 if limits else 4,
    )  # fmt: skip


def num_pieces(vocab_size: int) -> int:
    return triton.cdiv(vocab_size, PIECE)


def sample(logits: Tensor, rows: Tensor, keys: Tensor, identities: Tensor, positions: Tensor, temperatures: Tensor,
           top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None, *, tokens: Tensor | None = None,
           logprobs: Tensor | None = None, partial: Tensor | None = None) -> Tensor:  # fmt: skip
    """Token ids int64 [B] for draws from rows int64 [B] of logits [R, V]; several draws may share a row, each has its own settings.

    keys int32 [B, 2] and identities int64 [B] are the bits of unsigned numbers, positions int64 [B] places on the branches. The
    noise is the double-precision logarithm of the same 32-bit words on every device; of equal best tokens the first is drawn. -1 is
    drawn from a row that has NaN, +inf or nothing finite.

    temperatures float32 [B]: 0 takes the likeliest token. top_k int32, top_p and min_p float32 [B], all or none of them, restrict
    in this order; 0, 1 and 0 restrict nothing. Of tokens in order of logit / T, of equal ones the first ahead, those stay that have
    fewer than k ahead; of them, those ahead of which is less than the share p of their probability, each in whole units of 2^-32 of
    the likeliest's; of them, those whose logit / T is no less than the largest's plus log(min_p).

    logprobs float32 [B], where given, is filled with the logarithm of the drawn token's probability at temperature 1 with nothing
    ruled out. tokens, and partial float32 [5, B, num_pieces(V)] to work in, may be given too: then nothing is allocated.
    """
    draws, vocab = len(rows), logits.shape[1]
    assert logits.stride(1) == 1 and vocab <= MOST_TOKENS and keys.is_contiguous() and temperatures.dtype == torch.float32
    limits = tuple(x for x in (top_k, top_p, min_p) if x is not None)
    assert [x.dtype for x in limits] in ([], [torch.int32, torch.float32, torch.float32])
    shape = (PLANES, draws, num_pieces(vocab))
    tokens = torch.empty(draws, dtype=torch.int64, device=logits.device) if tokens is None else tokens
    partial = torch.empty(shape, dtype=torch.float32, device=logits.device) if partial is None else partial
    assert partial.shape == shape and partial.is_contiguous() and tokens.is_contiguous()
    if draws:
        cc, given = capability(logits.device), (rows, keys, identities, positions, temperatures)
        prepare(logits, *given, partial, logprob=logprobs is not None, capability=cc).run()
        prepare_choice(partial, tokens, logprobs, logits, given, limits, capability=cc).run()
    return tokens
