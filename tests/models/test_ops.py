"""The C++ operations against their definition, odd sizes and strides included."""

import sys

import pytest
import torch

from tts_engine.models.ops import NativeOps, TorchOps, ops_for

DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape, dtype, seed=0):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_as_defined(out, ref, wide):
    """As near to the same in float64 as the definition is, and within a rounding or two of it."""
    assert out.dtype == ref.dtype and out.shape == ref.shape and out.is_contiguous()
    error, yardstick = ((x.double() - wide).abs().max().item() for x in (out, ref))
    assert error <= 1.5 * yardstick + 1e-6 * wide.abs().max().item() + 1e-30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (7, 33), (64, 224), (300, 896)])
def test_norm(rows, width, dtype):
    x, weight = drawn(rows, width, dtype=dtype), drawn(width, dtype=dtype, seed=1)
    args = [(x, weight), (x.double(), weight.double())]
    wide = args[1][0] * torch.rsqrt(args[1][0].square().mean(-1, keepdim=True) + 1e-6) * args[1][1]
    assert_as_defined(NativeOps().norm(x, weight, 1e-6), TorchOps().norm(x, weight, 1e-6), wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (5, 3, 10), (40, 9, 64), (200, 7, 128)])
def test_norm_and_rotation_of_heads_within_wider_rows(tokens, heads, width, dtype):
    whole = drawn(tokens, heads + 2, width, dtype=dtype)
    x, weight = whole[:, :heads], drawn(heads, width, dtype=dtype, seed=1)
    wide = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_as_defined(NativeOps().norm(x, weight, 1e-5), TorchOps().norm(x, weight, 1e-5), wide)
    angles = 100 * torch.rand(tokens, width // 2, generator=torch.Generator().manual_seed(2))
    cos, sin = angles.cos(), angles.sin()
    wide = TorchOps().rotate(x.double(), cos.double(), sin.double())
    assert_as_defined(NativeOps().rotate(x, cos, sin), TorchOps().rotate(x, cos, sin), wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (7, 33), (64, 672), (200, 350)])
def test_swiglu(rows, width, dtype):
    x = drawn(rows, 2 * width, dtype=dtype)
    x[0, 0], x[-1, 0] = 200.0, -200.0  # where an exponential alone would overflow
    wide = TorchOps().swiglu(x.double())
    assert_as_defined(NativeOps().swiglu(x), TorchOps().swiglu(x), wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 1), (3, 16), (7, 33), (64, 224), (300, 895)])
def test_rows_of_bytes(rows, width, dtype):
    x = drawn(rows, width, dtype=dtype)
    x[: rows // 2] *= 1e-4
    x[2:3] = 0
    (out, scales), (ref, ref_scales) = (ops.quantise_rows(x) for ops in (NativeOps(), TorchOps()))
    assert out.dtype == torch.uint8 and torch.equal(scales, ref_scales)
    assert (out.int() - ref.int()).abs().max() <= 1 if rows else out.shape == ref.shape  # a half may go either way
    assert ((out.double() - 128) * scales.double()[:, None] - x.double()).abs().sub(0.501 * scales[:, None]).le(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_8_bit_floats_are_within_half_a_step(dtype):
    """A step is an eighth of the power of two below, and at least 2^-9 of the scale: of a peak, 448 times the scale, a 14th."""
    x = drawn(6, 200, dtype=dtype)
    x[1], x[2], x[3] = 1e-4 * x[1], 0, x[3] * torch.logspace(-6, 0, 200).to(dtype)
    out, scales = TorchOps().fp8_rows(x)
    assert out.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    stands_for = out.double() * scales.double()[:, None]
    half = torch.maximum(x.double().abs() / 16, scales.double()[:, None] * 2**-10)
    assert ((stands_for - x.double()).abs() <= half * (1 + 1e-6)).all()
    torch.testing.assert_close(stands_for.abs().amax(1), x.double().abs().amax(1), rtol=1e-6, atol=0)


def test_a_device_gets_what_is_made_for_it(monkeypatch):
    assert isinstance(ops_for(torch.device("cpu")), NativeOps)
    monkeypatch.setitem(sys.modules, "tts_kernels", None)
    ops_for.cache_clear()
    assert type(ops_for(torch.device("cuda", 0))) is TorchOps  # without Triton
    ops_for.cache_clear()


def test_a_row_that_is_not_finite_is_told_by_its_scale():
    x = drawn(5, 37, dtype=torch.float32)
    x[1, 3], x[2, 36], x[4, 20] = torch.nan, torch.inf, -torch.inf
    for ops in (NativeOps(), TorchOps()):
        bytes_, scales = ops.quantise_rows(x)
        out = ops.scale_rows(bytes_.float() - 128, scales, None, torch.float32)
        assert out.isfinite().all(1).tolist() == [True, False, False, True, False]
    bytes_, scales = TorchOps().fp8_rows(x)
    assert (bytes_.float() * scales[:, None]).isfinite().all(1).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("more", ["nothing", "a bias", "a residual"])
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 1), (3, 16), (7, 33), (300, 895)])
def test_scaled_rows(rows, width, more, dtype):
    x, scales = drawn(rows, width, dtype=torch.float32), drawn(rows, dtype=torch.float32, seed=1)
    added = {"nothing": None, "a bias": drawn(width, dtype=torch.float32, seed=2), "a residual": drawn(rows, width, dtype=dtype)}[
        more
    ]
    out, ref = (ops.scale_rows(x, scales, added, dtype) for ops in (NativeOps(), TorchOps()))
    if rows:
        wide = x.double() * scales.double()[:, None] + (0 if added is None else added.double())
        assert_as_defined(out, ref, wide)
    assert out.shape == ref.shape == (rows, width)


def test_bits_depend_neither_on_other_rows_nor_on_threads():
    x, weight = drawn(400, 350, dtype=torch.float32), drawn(350, dtype=torch.float32, seed=1)
    ops, before = ops_for(x.device), torch.get_num_threads()
    whole = ops.norm(x, weight, 1e-6), ops.swiglu(x)
    try:
        torch.set_num_threads(3)
        for i in (0, 17, 399):
            assert torch.equal(ops.norm(x[i : i + 1], weight, 1e-6)[0], whole[0][i])
            assert torch.equal(ops.swiglu(x[i : i + 1])[0], whole[1][i])
        assert torch.equal(ops.norm(x, weight, 1e-6), whole[0]) and torch.equal(ops.swiglu(x), whole[1])
    finally:
        torch.set_num_threads(before)
