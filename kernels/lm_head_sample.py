"""Draws straight from hidden states: the vocabulary's logits live a tile at a time in registers and are never written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability
from .sample import PLANES, leave, noise, prepare_choice, unfit

ROWS = (16, 64)  # draws of one tile
TOKENS = 128  # vocabulary entries of one tile
DEPTH = 64  # by which hidden states are multiplied; divides their width


@triton.jit(do_not_specialize=["num_draws"])
def _lm_head_sample(hidden, weight, rows, keys, identities, positions, temperatures, partial, num_draws, STRIDE: tl.constexpr,
                    WIDTH: tl.constexpr, VOCAB: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
                    LOGPROB: tl.constexpr):  # fmt: skip
    draw, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    live = draw < num_draws
    token = tile * TOKENS + tl.arange(0, TOKENS)
    known = token < VOCAB
    depth = tl.arange(0, DEPTH)
    states = hidden + tl.load(rows + draw, mask=live, other=0)[:, None] * STRIDE + depth[None, :]
    entries = weight + token.to(tl.int64)[:, None] * WIDTH + depth[None, :]
    logits = tl.zeros([ROWS, TOKENS], tl.float32)
    for i in range(0, WIDTH, DEPTH):
        state = tl.load(states + i, mask=live[:, None], other=0.0)
        entry = tl.load(entries + i, mask=known[:, None], other=0.0)
        logits = tl.dot(state, tl.trans(entry), logits, input_precision="ieee")
    logits = logits.to(hidden.dtype.element_ty).to(tl.float32)  # as the decoder rounds them
    logits = tl.where(known[None, :], logits, float("-inf"))
    temperature = tl.load(temperatures + draw, mask=live, other=0.0)
    score = logits
    if tl.max(temperature, 0) > 0:
        identity = tl.load(identities + draw, mask=live, other=0)[:, None]
        position = tl.load(positions + draw, mask=live, other=0).to(tl.uint32)[:, None]
        key_0 = tl.load(keys + 2 * draw, mask=live, other=0).to(tl.uint32, bitcast=True)[:, None]
        key_1 = tl.load(keys + 2 * draw + 1, mask=live, other=0).to(tl.uint32, bitcast=True)[:, None]
        counter = (tile * (TOKENS // 4) + tl.arange(0, TOKENS // 4)).to(tl.uint32)[None, :] + tl.zeros([ROWS, 1], tl.uint32)
        warm = (temperature > 0)[:, None]
        scaled = tl.div_rn(logits, tl.where(warm, temperature[:, None], 1.0))
        score = tl.where(warm, scaled + noise(counter, position, identity, key_0, key_1), logits)
    top, place = tl.max(score, 1, return_indices=True)
    its_logit = tl.max(tl.where(tl.arange(0, TOKENS)[None, :] == place[:, None], logits, float("-inf")), 1)
    peak = tl.max(logits, 1)
    mass = tl.zeros([ROWS], tl.float32)
    if LOGPROB:
        mass = tl.sum(tl.exp(logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), 1)
    leave(partial, draw * tl.num_programs(1) + tile, num_draws * tl.num_programs(1), tl.max(unfit(logits), 1), top,
          tl.where(top == float("-inf"), -1, tile * TOKENS + place), its_logit, peak, mass, live)  # fmt: skip


def prepare(hidden: Tensor, weight: Tensor, rows: Tensor, keys: Tensor, identities: Tensor, positions: Tensor,
            temperatures: Tensor, partial: Tensor, *, logprob: bool, capability: int) -> Launch:  # fmt: skip
    size = ROWS[0] if len(rows) <= ROWS[0] else ROWS[1]
    return Launch(
        kernel=_lm_head_sample,
        # Neighbouring programs read the same entries: many draws read the vocabulary once.
        grid=(triton.cdiv(len(rows), size), partial.shape[2]),
        arguments=dict(hidden=hidden, weight=weight, rows=rows, keys=keys, identities=identities, positions=positions,
                       temperatures=temperatures, partial=partial, num_draws=len(rows), STRIDE=hidden.stride(0),
                       WIDTH=hidden.shape[1], VOCAB=len(weight), ROWS=size, TOKENS=TOKENS, DEPTH=DEPTH, LOGPROB=logprob),
        capability=capability,
        num_stages=4,
    )  # fmt: skip


def num_tiles(vocab_size: int) -> int:
    return triton.cdiv(vocab_size, TOKENS)


def lm_head_sample(hidden: Tensor, weight: Tensor, rows: Tensor, keys: Tensor, identities: Tensor, positions: Tensor,
                   temperatures: Tensor, *, tokens: Tensor | None = None, logprobs: Tensor | None = None,
                   partial: Tensor | None = None) -> Tensor:  # fmt: skip
    """Token ids int64 [B] for draws from rows int64 [B] of hidden [R, d] against weight [V, d]; else as `sample` says.

    Nothing is restricted; partial is float32 [5, B, num_tiles(V)].

    A logit is a float32 sum rounded to hidden's dtype. Draws of one row multiply it anew, which costs nothing while reading the
    vocabulary is what takes the time.
    """
    draws = len(rows)
    assert hidden.dtype == weight.dtype and hidden.shape[1] % DEPTH == 0 and temperatures.dtype == torch.float32
    assert hidden.stride(1) == 1 and weight.is_contiguous() and keys.is_contiguous()
    shape = (PLANES, draws, num_tiles(len(weight)))
    tokens = torch.empty(draws, dtype=torch.int64, device=hidden.device) if tokens is None else tokens
    partial = torch.empty(shape, dtype=torch.float32, device=hidden.device) if partial is None else partial
    assert partial.shape == shape and partial.is_contiguous() and tokens.is_contiguous()
    if draws:
        cc, given = capability(hidden.device), (rows, keys, identities, positions, temperatures)
        prepare(hidden, weight, *given, partial, logprob=logprobs is not None, capability=cc).run()
        prepare_choice(partial, tokens, logprobs, capability=cc).run()
    return tokens
