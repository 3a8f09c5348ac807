"""New tokens on their way into attention: queries and keys normed and turned to their positions, keys and values put in slots."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability

WIDE = 4096  # pairs of elements of a token from which on eight warps share them


@triton.jit
def _store_kv(qkv, cos, sin, norm, slots, q, k_cache, v_cache, epsilon, STRIDE: tl.constexpr, HEADS: tl.constexpr,
              KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ALL: tl.constexpr, PAIRS: tl.constexpr,
              NORM: tl.constexpr):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head, dim = tl.arange(0, ALL)[:, None], tl.arange(0, PAIRS)[None, :]
    inside = dim < HALF
    own = (head < HEADS + 2 * KV_HEADS) & inside
    is_query, is_key = (head < HEADS) & inside, (head >= HEADS) & (head < HEADS + KV_HEADS) & inside
    at = qkv + token * STRIDE + head * HEAD_DIM + dim
    low, high = tl.load(at, mask=own, other=0.0), tl.load(at + HALF, mask=own, other=0.0)
    cosine = tl.load(cos + token * HALF + dim, mask=inside, other=0.0)
    sine = tl.load(sin + token * HALF + dim, mask=inside, other=0.0)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        squares = tl.sum(wide_low * wide_low + wide_high * wide_high, 1, keep_dims=True)
        scale = 1.0 / tl.sqrt_rn(squares / HEAD_DIM + epsilon)
        weight = norm + head * HEAD_DIM + dim
        weight_low = tl.load(weight, mask=is_query | is_key, other=0.0).to(tl.float32)
        weight_high = tl.load(weight + HALF, mask=is_query | is_key, other=0.0).to(tl.float32)
        # Rounded where the decoder's norm rounds: the quotient, then the product.
        wide_low = ((wide_low * scale).to(low.dtype).to(tl.float32) * weight_low).to(low.dtype).to(tl.float32)
        wide_high = ((wide_high * scale).to(low.dtype).to(tl.float32) * weight_high).to(low.dtype).to(tl.float32)
    turned_low = (wide_low * cosine - wide_high * sine).to(low.dtype)
    turned_high = (wide_high * cosine + wide_low * sine).to(low.dtype)
    to = q + (token * HEADS + head) * HEAD_DIM + dim
    tl.store(to, turned_low, mask=is_query)
    tl.store(to + HALF, turned_high, mask=is_query)
    if KV_HEADS:
        slot = tl.load(slots + token) * KV_HEADS
        to = k_cache + (slot + head - HEADS) * HEAD_DIM + dim
        tl.store(to, turned_low, mask=is_key)
        tl.store(to + HALF, turned_high, mask=is_key)
        is_value = own & (head >= HEADS + KV_HEADS)
        to = v_cache + (slot + head - HEADS - KV_HEADS) * HEAD_DIM + dim
        tl.store(to, low, mask=is_value)
        tl.store(to + HALF, high, mask=is_value)


def prepare(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor | None, q: Tensor, k_cache: Tensor | None,
            v_cache: Tensor | None, *, norm: Tensor | None = None, epsilon: float = 0.0, capability: int) -> Launch:  # fmt: skip
    dim = qkv.shape[2]
    heads, pairs = triton.next_power_of_2(qkv.shape[1]), triton.next_power_of_2(dim // 2)
    nothing = dict(norm=cos, slots=cos, k_cache=q, v_cache=q)  # of which nothing is read or written
    given = dict(norm=norm, slots=slots, k_cache=k_cache, v_cache=v_cache)
    return Launch(
        kernel=_store_kv,
        grid=(len(qkv),),
        arguments=dict(qkv=qkv, cos=cos, sin=sin, q=q, epsilon=epsilon, STRIDE=qkv.stride(0), HEADS=q.shape[1],
                       KV_HEADS=0 if k_cache is None else k_cache.shape[1], HEAD_DIM=dim, ALL=heads, PAIRS=pairs,
                       NORM=norm is not None) | {name: nothing[name] if x is None else x for name, x in given.items()},
        capability=capability,
        num_warps=8 if heads * pairs > WIDE else 4,
    )  # fmt: skip


def store_kv(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor | None = None, k_cache: Tensor | None = None,
             v_cache: Tensor | None = None, *, norm: Tensor | None = None, epsilon: float = 0.0) -> Tensor:  # fmt: skip
    """The queries [T, H, D] of qkv [T, H + 2 K, D], turned; its keys, turned, and values stored at slots int64 [T].

    cos, sin float32 [T, D/2]: the first half of D is turned against the second, in float32 and rounded once. k_cache, v_cache
    [slots, K, D]; without them all heads are queries. norm [H + K, D]: queries and keys are RMSNormed before they are turned.
    """
    kv_heads, dim = 0 if k_cache is None else k_cache.shape[1], qkv.shape[2]
    assert qkv.stride()[1:] == (dim, 1) and cos.is_contiguous() and sin.is_contiguous()
    assert all(x is None or x.is_contiguous() for x in (norm, slots, k_cache, v_cache))
    q = qkv.new_empty((len(qkv), qkv.shape[1] - 2 * kv_heads, dim))
    if len(qkv):
        prepare(qkv, cos, sin, slots, q, k_cache, v_cache, norm=norm, epsilon=epsilon, capability=capability(qkv.device)).run()
    return q
