"""What a decoder does between its matrix products, row by row: PyTorch says what, C++ does it on a CPU and Triton on a GPU, in one
call each."""

from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]
from ..kv.cache import KVCache

LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
LEAST_PEAK = 1e-30  # a row below it counts as zeros: 127 divided by its peak must be finite


class Ops(Protocol):
    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNorm of x [..., D] by weight [D] or, for x [T, N, D], [N, D]: the mean of squares in float32, the quotient rounded to
        the dtype before the weight is applied, as transformers rounds."""
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, N, D] turned by cos, sin float32 [T, D/2], the first half of D against the second."""
        ...

    def turn(self, heads: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
        """heads [T, N, D], normed by weight [N, D] where there is one, and rotated."""
        ...

    def enter(self, heads: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor, cache: KVCache, layer: int,
              slots: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """What attention is given of heads [T, H + 2 K, D], of which the last K are values: queries [T, H, D] and keys [T, K, D],
        both as `turn` makes them, and the values. Keys and values are None where they are in their slots of the layer already,
        int64 [T] of the plan."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2I] -> silu(gate) * up [T, I]."""
        ...

    def fp8_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> float8_e4m3fn [T, D], and float32 [T] each row's peak / 448: x is about the one times the other. The scale of
        a row that is not finite is not finite either."""
        ...

    def quantise_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> bytes uint8 [T, D], and float32 [T] each row's peak / 127: x is (bytes - 128) times that, to half of it."""
        ...

    def scale_rows(self, x: Tensor, scales: Tensor, more: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x float32 [T, D] times scales [T], plus `more` [T, D] or [D] where there is some, in `dtype`."""
        ...


class TorchOps:
    """The definition, on any device."""

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return weight * wide.to(x.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def turn(self, heads: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotate(heads if weight is None else self.norm(heads, weight, epsilon), cos, sin)

    def enter(self, heads: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor, cache: KVCache, layer: int,
              slots: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        kv_heads = cache.num_kv_heads
        turned = self.turn(heads[:, :-kv_heads], weight, epsilon, cos, sin)
        return turned[:, :-kv_heads], turned[:, -kv_heads:], heads[:, -kv_heads:]

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def fp8_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales = x.abs().amax(1).float().clamp_min(LEAST_PEAK) / LARGEST_FP8
        return (x.float() / scales[:, None]).to(torch.float8_e4m3fn), scales

    def quantise_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        peaks = x.abs().amax(1).float()
        steps = x * (127 / peaks.clamp_min(LEAST_PEAK))[:, None] + 128.5
        return steps.nan_to_num(128.5).to(torch.uint8), peaks / 127  # 1 to 255; a byte is made by leaving the fraction out

    def scale_rows(self, x: Tensor, scales: Tensor, more: Tensor | None, dtype: torch.dtype) -> Tensor:
        scaled = x * scales[:, None]
        return (scaled if more is None else scaled + more).to(dtype)


class NativeOps(TorchOps):
    """float32 and bfloat16 on a CPU. A row's bits depend on that row alone; what PyTorch rounds at every step is rounded once."""

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        width = x.shape[-1]
        group = x.shape[1] if x.dim() == 3 else 1
        out = x.new_empty(x.shape)
        _C.rms_norm(_rows(x).data_ptr(), x.stride(0), group, weight.data_ptr(), weight.numel() // width, epsilon, out.data_ptr(),
                    x.numel() // width, width, *_how(x))  # fmt: skip
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        _C.rotate(_rows(x).data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *x.shape, *_how(x))
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        _C.swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width // 2, *_how(gate_up))
        return out

    def quantise_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        out, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), dtype=torch.float32)
        _C.quantise_rows(x.data_ptr(), out.data_ptr(), scales.data_ptr(), *x.shape, *_how(x))
        return out, scales

    def scale_rows(self, x: Tensor, scales: Tensor, more: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert x.is_contiguous() and scales.is_contiguous() and (more is None or more.is_contiguous())
        out = x.new_empty(x.shape, dtype=dtype)
        given = (0, 0, False) if more is None else (more.data_ptr(), x.shape[1] * (more.dim() - 1), _how(more)[0])
        _C.scale_rows(x.data_ptr(), scales.data_ptr(), *given, out.data_ptr(), *x.shape, *_how(out))
        return out


class TritonOps(TorchOps):
    """A launch each. Rounded where the definition rounds, but for a rotation, which is rounded once."""

    def __init__(self) -> None:
        """Raises ImportError where Triton is missing."""
        from tts_kernels import fp8_rows, rms_norm, store_kv, swiglu

        self._norm, self._store_kv, self._swiglu, self._fp8_rows = (
            rms_norm.rms_norm,
            store_kv.store_kv,
            swiglu.swiglu,
            fp8_rows.fp8_rows,
        )

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return self._norm(x, weight, epsilon)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._store_kv(x, cos, sin)

    def turn(self, heads: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
        return self._store_kv(heads, cos, sin, norm=weight, epsilon=epsilon)

    def enter(self, heads: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor, cache: KVCache, layer: int,
              slots: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        queries = self._store_kv(heads, cos, sin, slots, cache.k[layer], cache.v[layer], norm=weight, epsilon=epsilon)
        return queries, None, None

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return self._swiglu(gate_up)

    def fp8_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._fp8_rows(x, LEAST_PEAK)


@cache
def ops_for(device: torch.device) -> Ops:
    """What is fastest there; on a GPU without Triton the definition."""
    if device.type == "cpu":
        return NativeOps()
    try:
        return TritonOps()
    except ImportError:
        return TorchOps()


def _rows(x: Tensor) -> Tensor:
    assert x.stride(-1) == 1 and (x.dim() < 3 or x.stride(1) == x.shape[2]), "the elements of a row lie side by side"
    return x


def _how(x: Tensor) -> tuple[bool, int]:
    assert x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.bfloat16, torch.get_num_threads()
