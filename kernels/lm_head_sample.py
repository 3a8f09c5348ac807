"""Draws straight from hidden states: the vocabulary's logits live a tile at a time in registers and are never written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability
from .sample import noise

ROWS = (16, 64)  # draws of one tile
TOKENS = 128  # vocabulary entries of one tile
DEPTH = 64  # by which hidden states are multiplied; divides their width


@triton.jit(do_not_specialize=["num_draws"])
def _lm_head_sample(hidden, weight, rows, keys, identities, positions, best, best_token, num_draws, temperature,
                    STRIDE: tl.constexpr, WIDTH: tl.constexpr, VOCAB: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                    DEPTH: tl.constexpr):  # fmt: skip
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
    identity = tl.load(identities + draw, mask=live, other=0)[:, None]
    position = tl.load(positions + draw, mask=live, other=0).to(tl.uint32)[:, None]
    key_0 = tl.load(keys + 2 * draw, mask=live, other=0).to(tl.uint32, bitcast=True)[:, None]
    key_1 = tl.load(keys + 2 * draw + 1, mask=live, other=0).to(tl.uint32, bitcast=True)[:, None]
    counter = (tile * (TOKENS // 4) + tl.arange(0, TOKENS // 4)).to(tl.uint32)[None, :] + tl.zeros([ROWS, 1], tl.uint32)
    score = tl.div_rn(logits, temperature) + noise(counter, position, identity, key_0, key_1)
    found, place = tl.max(tl.where(known[None, :], score, float("-inf")), 1, return_indices=True)
    at = draw * tl.num_programs(1) + tile
    tl.store(best + at, found, mask=live)
    tl.store(best_token + at, tile * TOKENS + place, mask=live)


def prepare(hidden: Tensor, weight: Tensor, rows: Tensor, keys: Tensor, identities: Tensor, positions: Tensor, best: Tensor,
            best_token: Tensor, temperature: float, *, capability: int) -> Launch:  # fmt: skip
    size = ROWS[0] if len(rows) <= ROWS[0] else ROWS[1]
    return Launch(
        kernel=_lm_head_sample,
        # Neighbouring programs read the same entries: many draws read the vocabulary once.
        grid=(triton.cdiv(len(rows), size), best.shape[1]),
        arguments=dict(hidden=hidden, weight=weight, rows=rows, keys=keys, identities=identities, positions=positions, best=best,
                       best_token=best_token, num_draws=len(rows), temperature=temperature, STRIDE=hidden.stride(0),
                       WIDTH=hidden.shape[1], VOCAB=len(weight), ROWS=size, TOKENS=TOKENS, DEPTH=DEPTH),
        capability=capability,
        num_stages=4,
    )  # fmt: skip


def lm_head_sample(hidden: Tensor, weight: Tensor, rows: Tensor, keys: Tensor, identities: Tensor, positions: Tensor,
                   temperature: float) -> Tensor:  # fmt: skip
    """Token ids int64 [B] for draws from rows int64 [B] of hidden [R, d] against weight [V, d]; else as kernels/sample.py says.

    A logit is a float32 sum rounded to hidden's dtype. Draws of one row multiply it anew, which costs nothing while reading the
    vocabulary is what takes the time.
    """
    assert temperature > 0 and hidden.dtype == weight.dtype and hidden.shape[1] % DEPTH == 0
    assert hidden.stride(1) == 1 and weight.is_contiguous() and keys.is_contiguous()
    shape = (len(rows), triton.cdiv(len(weight), TOKENS))
    best = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    token = torch.empty(shape, dtype=torch.int64, device=hidden.device)
    prepare(hidden, weight, rows, keys, identities, positions, best, token, temperature,
            capability=capability(hidden.device)).run()  # fmt: skip
    return token.gather(1, best.argmax(1, keepdim=True))[:, 0]
