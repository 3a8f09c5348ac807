"""The matrices of a decoder: rows in, rows times W^T out. What a matrix is kept as is decided once, at load, by its shape.

GFLOP/s on one core of a Xeon (Sapphire Rapids, AMX off) at 1 / 4 / 16 / 64 rows, W 9728 x 896; the others differ by a tenth:
float32 7 / 13 / 45 / 102, packed 7 / 23 / 60 / 116; bfloat16 8 / 25 / 51 / 73, packed 10 / 33 / 62 / 78; bytes through
`torch._int_mm` 20 / 46 / 153 / 362, through oneDNN 24 / 87 / 201 / 420. On two cores: bfloat16 packed 21 / 66 / 124 / 152, widened
25 / 82 / 199 / 257; float32 packed 14 / 46 / 123 / 233, by our own product 15 / 53 / 143 / 238.
"""

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]
from .ops import LARGEST_FP8, LEAST_PEAK, TorchOps, ops_for

# Entries from which a packed matrix was faster at every number of rows, or as fast. Below, in float32, the call alone costs more
# than the product, and others have met small matrices that a packed layout slows down a hundredfold.
PACKED_FROM = {torch.float32: 1 << 21, torch.bfloat16: 1 << 19}
PACKED_FOR = 32  # rows that the layout is chosen for; any number can be multiplied
PANEL = 32  # rows of a matrix that csrc/linear.cpp keeps side by side
FLOAT_ROWS = 1024  # rows of bytes that are made floats at a time, where only floats can be multiplied
FP8 = torch.float8_e4m3fn
FP8_SIDES = 16  # a GPU multiplies 8-bit floats where N and K are multiples of it


class Linear(Protocol):
    """W [N, K], and where there is one a bias [N]."""

    shape: tuple[int, int]  # N, K
    by_row: bool  # a row of a product hangs on its own row of x alone, whatever the number of rows

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, K] -> x W^T + bias [T, N], in x's dtype or the given one."""
        ...

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [T, N] + x W^T, rounded once but where a form says otherwise. Only of a matrix without bias; the result may be
        where the residual was."""
        ...


class Table(Protocol):
    """A matrix whose rows are looked up."""

    def rows(self, numbers: Tensor) -> Tensor:
        """numbers int64 [T] -> those rows of W [T, K]."""
        ...


class Plain:
    """The definition, on any device."""

    by_row = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = (len(weight), weight.shape[1])
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias).to(dtype or x.dtype)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.addmm_(x, self.weight.T)  # within the product: otherwise a GPU copies the residual first

    def rows(self, numbers: Tensor) -> Tensor:
        return self.weight.index_select(0, numbers)


class Packed:
    """The weights in the order in which oneDNN's kernel reads them; the tensor they came from is not kept."""

    by_row = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = (len(weight), weight.shape[1])
        self._weight, self._bias = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR), bias

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "").to(dtype or x.dtype)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, None, "add")


class Widened:
    """The weights in the order in which our own product reads them, which is of float32 whatever they are."""

    by_row = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [N, K] float32 or bfloat16, which is not kept."""
        self.shape = (len(weight), weight.shape[1])
        self._weight, self.bias = weight.new_empty(_C.packed_entries(*self.shape)), bias
        _C.pack(weight.contiguous().data_ptr(), self._weight.data_ptr(), self._narrow, *self.shape, torch.get_num_threads())

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._times(x, self.bias, dtype or x.dtype)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._times(x, residual, residual.dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        panels, places = numbers // PANEL, numbers % PANEL
        if self._narrow:
            places = places % (PANEL // 2) * 2 + places // (PANEL // 2)  # rows i and i + PANEL / 2 share a word
        return self._weight.view(-1, self.shape[1], PANEL)[panels, :, places]

    @property
    def _narrow(self) -> bool:
        return self._weight.dtype == torch.bfloat16

    def _times(self, x: Tensor, more: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert x.is_contiguous() and (more is None or (more.is_contiguous() and more.dtype == x.dtype))
        out = x.new_empty(len(x), self.shape[0], dtype=dtype)
        added = (0, 0) if more is None else (more.data_ptr(), self.shape[0] * (more.dim() - 1))
        _C.linear(x.data_ptr(), x.dtype == torch.bfloat16, self._weight.data_ptr(), self._narrow, *added, out.data_ptr(),
                  dtype == torch.bfloat16, len(x), *self.shape, torch.get_num_threads())  # fmt: skip
        return out


class Int8:
    """W8A8: a scale for each row of W, made at load, and one for each row of x, made when it comes: its peak / 127.

    Products of bytes are summed as integers, and every rounding after that is of one element: a row's bits depend on that row
    alone. oneDNN takes one scale for all of x, so rows are scaled afterwards. Its x is unsigned (signed bytes fall into a loop
    that is a thousand times slower), so 128 is added to x and taken off again through the sums of W's rows; told of the 128, it
    would work these out in every call.
    """

    BYTES_PER_ROW = 16  # of W, beside its own bytes

    def __init__(self, weight: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None) -> None:
        """weight int8 [N, K], which is not kept, and float32 [N] its scales and the sums of its rows, as `quantise` writes them."""
        self.shape = (len(weight), weight.shape[1])
        self._scales, self._bias = scales, bias.float() if bias is not None else None
        self._offsets = -128 * scales * sums
        self._no_zeros = torch.zeros(len(weight), dtype=torch.int64)
        # Without VNNI old processors add pairs of products in 16 bits that cannot hold them.
        self.by_row = self._exact = multiplies_bytes() and self.shape[1] * 255 * 127 < 1 << 31
        self._weight = torch.ops.onednn.qlinear_prepack(weight, None) if self._exact else weight.clone()

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._times(x, self._bias, dtype or x.dtype)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._times(x, residual, residual.dtype)

    def _times(self, x: Tensor, more: Tensor | None, dtype: torch.dtype) -> Tensor:
        ops = ops_for(x.device)
        bytes_, scales = ops.quantise_rows(x)
        if self._exact:
            out = torch.ops.onednn.qlinear_pointwise(bytes_, 1.0, 0, self._weight, self._scales, self._no_zeros, self._offsets,
                                                     1.0, 0, torch.float32, "none", [], "")  # fmt: skip
        else:
            centred = bytes_.float() - 128
            out = torch.cat([F.linear(centred, rows.float()) for rows in self._weight.split(FLOAT_ROWS)], 1) * self._scales
        return ops.scale_rows(out, scales, more, dtype)


class Fp8:
    """W8A8 in e4m3 floats: a scale for each row of W, made at load, and one for each row of x, made when it comes: its peak / 448.

    `torch._scaled_mm` sums in float32, scales, adds the bias and rounds to bfloat16; a residual is added to that, which rounds
    again. Where it cannot be had, by device or by shape, the definition: floats of W, a few rows at a time, multiplied as float32.
    """

    BYTES_PER_ROW = 4  # of W, beside its own bytes
    by_row = False

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        """weight float8_e4m3fn [N, K] and float32 [N] its scales, as `quantise_fp8` writes them."""
        self.shape = (len(weight), weight.shape[1])
        self._weight, self._scales = weight, scales
        self._bias = bias.bfloat16() if bias is not None else None
        self._multiplies = not any(side % FP8_SIDES for side in self.shape) and multiplies_fp8(weight.device)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x.dtype
        if not self._multiplies:
            bytes_, scales = TorchOps().fp8_rows(x)
            wide = bytes_.float()
            out = torch.cat([F.linear(wide, rows.float()) for rows in self._weight.split(FLOAT_ROWS)], 1)
            out = out * self._scales * scales[:, None]
            return (out if self._bias is None else out + self._bias).to(dtype)
        bytes_, scales = ops_for(x.device).fp8_rows(x)
        return torch._scaled_mm(bytes_, self._weight.T, scale_a=scales[:, None], scale_b=self._scales[None], bias=self._bias,
                                out_dtype=torch.bfloat16, use_fast_accum=False).to(dtype)  # fmt: skip

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.add_(self(x))


def activations(dtype: torch.dtype) -> torch.dtype:
    """What flows between matrices of this dtype, and is kept as keys and values.

    Between matrices of 8-bit floats bfloat16, in which their products come. Between matrices of bytes too, for half the memory of
    keys, values and embedding; where PyTorch makes the bytes and scales the rows, float32 would spare it conversions: a fifth of a
    layer's time at 64 rows of a 0.5B shape.
    """
    return torch.bfloat16 if dtype in (torch.int8, FP8) else dtype


def float_form(entries: int, dtype: torch.dtype, device: torch.device | str, *, deterministic: bool = False,
               ) -> type[Plain] | type[Packed] | type[Widened]:  # fmt: skip
    """What a float32 or bfloat16 matrix of so many entries is fastest as; of forms that go by row, where there is one, if
    `deterministic`. Each takes the weight and the bias."""
    if torch.device(device).type != "cpu":
        return Plain
    if _C.multiplies_floats() and (deterministic or (dtype == torch.bfloat16 and not _C.multiplies_pairs())):
        return Widened
    able = torch.backends.mkldnn.is_available() and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Packed if able and entries >= PACKED_FROM[dtype] else Plain


def quantise(rows: Tensor, out: Tensor, scales: Tensor, sums: Tensor) -> None:
    """Write float32 rows [R, K], which are spoilt, to `out` int8 [R, K]; of a row `scales` [R], its peak / 127, and `sums` [R]."""
    torch.amax(rows.abs(), 1, out=scales)
    scales.clamp_min_(LEAST_PEAK).div_(127)
    out.copy_(rows.div_(scales[:, None]).round_())
    torch.sum(rows, 1, out=sums)


def quantise_fp8(rows: Tensor, out: Tensor, scales: Tensor) -> None:
    """Write float32 rows [R, K], which are spoilt, to `out` float8_e4m3fn [R, K]; of a row `scales` [R], its peak / 448."""
    torch.amax(rows.abs(), 1, out=scales)
    scales.clamp_min_(LEAST_PEAK).div_(LARGEST_FP8)
    out.copy_(rows.div_(scales[:, None]))


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` multiplies 8-bit floats there, with a scale for each row of both."""
    ones = torch.ones(FP8_SIDES, 2 * FP8_SIDES, device=device).to(FP8)
    scales = torch.arange(1.0, 1 + FP8_SIDES, device=device)
    try:
        out = torch._scaled_mm(ones, ones.T, scale_a=scales[:, None], scale_b=scales[None], out_dtype=torch.bfloat16,
                               use_fast_accum=False)  # fmt: skip
    except (AttributeError, RuntimeError):  # a build of PyTorch, or a GPU, that has no such product
        return False
    return bool((out.float() == 2 * FP8_SIDES * scales[:, None] * scales).all())


@cache
def multiplies_bytes() -> bool:
    """Whether oneDNN multiplies bytes on this processor without losing any of it."""
    weight = torch.full((64, 64), 127, dtype=torch.int8)
    ones, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int64)
    try:
        out = torch.ops.onednn.qlinear_pointwise(torch.full((64, 64), 255, dtype=torch.uint8), 1.0, 0,
                                                 torch.ops.onednn.qlinear_prepack(weight, None), ones, zeros, None, 1.0, 0,
                                                 torch.float32, "none", [], "")  # fmt: skip
    except (AttributeError, RuntimeError):  # a build of PyTorch, or a processor, that has no such product
        return False
    return bool((out == 64 * 255 * 127).all())
