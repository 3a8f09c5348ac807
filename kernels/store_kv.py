"""New tokens on their way into attention: queries and keys turned to their positions, keys and values put in their slots."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, capability


@triton.jit
def _store_kv(qkv, cos, sin, slots, q, k_cache, v_cache, STRIDE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
              HEAD_DIM: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head, dim = tl.arange(0, ALL)[:, None], tl.arange(0, HALF)[None, :]
    own = head < HEADS + 2 * KV_HEADS
    at = qkv + token * STRIDE + head * HEAD_DIM + dim
    low, high = tl.load(at, mask=own, other=0.0), tl.load(at + HALF, mask=own, other=0.0)
    cosine, sine = tl.load(cos + token * HALF + dim), tl.load(sin + token * HALF + dim)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    turned_low = (wide_low * cosine - wide_high * sine).to(low.dtype)
    turned_high = (wide_high * cosine + wide_low * sine).to(low.dtype)
    is_query, is_key, is_value = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS), (head >= HEADS + KV_HEADS) & own
    to = q + (token * HEADS + head) * HEAD_DIM + dim
    tl.store(to, turned_low, mask=is_query)
    tl.store(to + HALF, turned_high, mask=is_query)
    slot = tl.load(slots + token) * KV_HEADS
    to = k_cache + (slot + head - HEADS) * HEAD_DIM + dim
    tl.store(to, turned_low, mask=is_key)
    tl.store(to + HALF, turned_high, mask=is_key)
    to = v_cache + (slot + head - HEADS - KV_HEADS) * HEAD_DIM + dim
    tl.store(to, low, mask=is_value)
    tl.store(to + HALF, high, mask=is_value)


def prepare(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, *,
            capability: int) -> Launch:  # fmt: skip
    return Launch(
        kernel=_store_kv,
        grid=(len(qkv),),
        arguments=dict(qkv=qkv, cos=cos, sin=sin, slots=slots, q=q, k_cache=k_cache, v_cache=v_cache, STRIDE=qkv.stride(0),
                       HEADS=q.shape[1], KV_HEADS=k_cache.shape[1], HEAD_DIM=q.shape[2], ALL=triton.next_power_of_2(qkv.shape[1])),
        capability=capability,
    )  # fmt: skip


def store_kv(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """The queries [T, H, D] of qkv [T, H + 2 K, D], turned; its keys, turned, and values stored at slots int64 [T].

    cos, sin float32 [T, D/2]: the first half of D is turned against the second, in float32 and rounded once. k_cache, v_cache
    [slots, K, D].
    """
    kv_heads, dim = k_cache.shape[1:]
    assert qkv.stride()[1:] == (dim, 1) and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert cos.is_contiguous() and sin.is_contiguous() and dim & (dim - 1) == 0
    q = qkv.new_empty((len(qkv), qkv.shape[1] - 2 * kv_heads, dim))
    if len(qkv):
        prepare(qkv, cos, sin, slots, q, k_cache, v_cache, capability=capability(qkv.device)).run()
    return q
