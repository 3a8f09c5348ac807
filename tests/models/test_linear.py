"""Every form of a matrix against the product in float64, with bounds that follow from how it rounds."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from tts_engine import _C
from tts_engine.models import linear
from tts_engine.models.linear import Fp8, Int8, Packed, Plain, Widened, float_form, multiplies_bytes, quantise
from tts_engine.models.ops import TorchOps

SHAPES = [(1, 1), (1, 7), (7, 1), (33, 64), (97, 48), (129, 257), (301, 350)]  # N, K
ROWS = [0, 1, 5, 33]
needs_packing = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
needs_floats = pytest.mark.skipif(not _C.multiplies_floats(), reason="our own product needs AVX-512")
needs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here")
FORMS = [
    pytest.param(Plain, torch.float32, id="plain-float32"),
    pytest.param(Plain, torch.bfloat16, id="plain-bfloat16"),
    pytest.param(Packed, torch.float32, id="packed-float32", marks=needs_packing),
    pytest.param(Packed, torch.bfloat16, id="packed-bfloat16", marks=[needs_packing, needs_bf16]),
    pytest.param(Widened, torch.float32, id="widened-float32", marks=needs_floats),
    pytest.param(Widened, torch.bfloat16, id="widened-bfloat16", marks=needs_floats),
]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8_of(weight, bias=None):
    """An Int8 and the matrix that it stands for, float64."""
    quantised, scales, sums = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight)), torch.empty(len(weight))
    quantise(weight.float().clone(), quantised, scales, sums)
    return Int8(quantised, scales, sums, bias), quantised.double() * scales.double()[:, None]


@contextmanager
def poisoned():
    """Whatever is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def half_steps(x):
    """Half a step of the bytes that each row of x is made: what one of its elements can be off, and a little for the quotient."""
    return x.double().abs().amax(1, keepdim=True).clamp_min(linear.LEAST_PEAK) / 127 * (0.5 + 1e-4)


def assert_within_steps(out, x, exact, extra):
    """Within what rounding x's rows to their steps can do to products with `exact`, plus `extra`, and a part of the result."""
    assert out.shape == (len(x), len(exact)) and not out.isnan().any()
    ref = x.double() @ exact.T
    bound = half_steps(x) * exact.abs().sum(1) + 2e-6 * (half_steps(x) * 254) * exact.abs().sum(1)
    assert ((out.double() - ref - extra).abs() <= bound + torch.finfo(out.dtype).eps * (ref + extra).abs()).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_floats(form, dtype, shape, rows):
    weight, x = drawn(*shape, dtype=dtype, seed=1), drawn(rows, shape[1], dtype=dtype)
    bias, residual = drawn(shape[0], dtype=dtype, seed=2), drawn(rows, shape[0], dtype=dtype, seed=3)
    ref = x.double() @ weight.double().T
    bound = 1e-6 * (x.double().abs() @ weight.double().abs().T + 4)  # of sums in float32, in any order
    with poisoned():
        biased, bare = form(weight, bias), form(weight)
        outs = [(bare(x), ref, 0), (bare(x, torch.float32), ref, 0), (biased(x), ref + bias.double(), 0)]
        outs.append((bare.added_to(residual.clone(), x), ref + residual.double(), 0))
    assert bare.shape == shape
    assert [out.dtype for out, *_ in outs] == [dtype, torch.float32, dtype, dtype]
    for out, wanted, _ in outs:
        assert out.shape == (rows, shape[0])
        assert ((out.double() - wanted).abs() <= bound + torch.finfo(dtype).eps * wanted.abs()).all()


@pytest.mark.parametrize("exact", [True, False], ids=["bytes", "no-byte-products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(monkeypatch, shape, rows, dtype, exact):
    if not exact:
        monkeypatch.setattr(linear, "multiplies_bytes", lambda: False)
        monkeypatch.setattr(linear, "FLOAT_ROWS", 40)
    weight, x = drawn(*shape, seed=1), drawn(rows, shape[1], dtype=dtype)
    bias, residual = drawn(shape[0], dtype=dtype, seed=2), drawn(rows, shape[0], dtype=dtype, seed=3)
    with poisoned():
        (biased, _), (bare, stands_for) = int8_of(weight, bias), int8_of(weight)
        outs = [bare(x), bare(x, torch.float32), biased(x), bare.added_to(residual, x)]
    assert bare.shape == shape and [out.dtype for out in outs] == [dtype, torch.float32, dtype, dtype]
    for out, extra in zip(outs, (0, 0, bias.double(), residual.double()), strict=True):
        assert_within_steps(out, x, stands_for, extra)


def fp8_of(weight, bias=None):
    """An Fp8 and the matrix that it stands for, float64."""
    quantised, scales = torch.empty(weight.shape, dtype=linear.FP8), torch.empty(len(weight))
    linear.quantise_fp8(weight.float().clone(), quantised, scales)
    return Fp8(quantised, scales, bias), quantised.double() * scales.double()[:, None]


FP8_SHAPES = [(1, 1), (32, 48), (97, 48), (16, 350), (304, 352)]


@pytest.mark.parametrize("able", [True, False], ids=["multiplied", "as-defined"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_fp8(monkeypatch, shape, rows, able):
    """The product of what both sides stand for. What `torch._scaled_mm` gives is rounded before a residual is added to it."""
    if able and not linear.multiplies_fp8(torch.device("cpu")):
        pytest.skip("this PyTorch has no such product on a CPU")
    monkeypatch.setattr(linear, "multiplies_fp8", lambda device: able)
    monkeypatch.setattr(linear, "FLOAT_ROWS", 40)
    weight, x = drawn(*shape, seed=1), drawn(rows, shape[1], dtype=torch.bfloat16)
    bias, residual = (drawn(*s, dtype=torch.bfloat16, seed=2) for s in ((shape[0],), (rows, shape[0])))
    given, scales = TorchOps().fp8_rows(x)
    with poisoned():
        (biased, _), (bare, stands_for) = fp8_of(weight, bias), fp8_of(weight)
        outs = [bare(x), bare(x, torch.float32), biased(x), bare.added_to(residual.clone(), x)]
    assert bare.shape == shape and [out.dtype for out in outs] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    product = (given.double() * scales.double()[:, None]) @ stands_for.T
    for out, extra in zip(outs, (0, 0, bias.double(), residual.double()), strict=True):
        bound = 1e-5 * (x.double().abs() @ weight.double().abs().T) + 2**-8 * ((product + extra).abs() + product.abs())
        assert out.shape == (rows, shape[0]) and ((out.double() - product - extra).abs() <= bound).all()


def test_fp8_is_off_by_less_than_a_twentieth():
    """A number is a 32nd off on average at worst, of both sides; in a sum of many such products the errors grow as it does."""
    weight, x = drawn(512, 1024, seed=1), drawn(64, 1024, dtype=torch.bfloat16)
    ref = x.double() @ weight.double().T
    error = (fp8_of(weight)[0](x, torch.float32) - ref).square().mean().sqrt() / ref.square().mean().sqrt()
    assert 0.01 < error < 0.05


def test_a_row_that_is_no_number_spoils_its_own_fp8_row_only():
    form, x = fp8_of(drawn(32, 48))[0], drawn(3, 48, dtype=torch.bfloat16, seed=1)
    clean = form(x)
    x[1, 5] = torch.nan
    out = form(x)
    assert not out[1].isfinite().any() and torch.equal(out[::2], clean[::2])


def test_a_matrix_is_quantised_to_half_a_step_of_each_row():
    weight = drawn(5, 70)
    weight[1], weight[2], weight[3] = 0, 1e30 * weight[2], 1e-20 * weight[3]
    _, stands_for = int8_of(weight)
    assert ((weight.double() - stands_for).abs() <= half_steps(weight)).all() and stands_for[1].eq(0).all()
    assert (stands_for.abs().amax(1) - weight.double().abs().amax(1)).abs().max() <= 1e-6 * 1e31


def test_rows_of_nothing_of_one_peak_and_of_any_size_are_within_their_own_steps():
    """A row without any size, rows of huge and of tiny numbers, one outlier, all at the ends of the range, side by side."""
    x = drawn(8, 96)
    x[0], x[1], x[2], x[3] = 0, 1e30 * x[1], 1e-25 * x[2], 1e-38
    x[4, 17], x[5], x[6] = 3e3, 2.0, -2.0
    form, stands_for = int8_of(drawn(40, 96, seed=1))
    out = form(x)
    assert_within_steps(out, x, stands_for, 0)
    assert out[0].eq(0).all() and out.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_number_that_is_none_spoils_its_own_row_only(bad):
    x = drawn(3, 50)
    form, _ = int8_of(drawn(9, 50, seed=1))
    clean = form(x)
    x[1, 7] = bad
    out = form(x)
    assert not out[1].isfinite().any() and torch.equal(out[::2], clean[::2])


BY_ROW = [
    pytest.param(lambda weight, bias: int8_of(weight, bias)[0], torch.bfloat16, id="int8",
                 marks=pytest.mark.skipif(not multiplies_bytes(), reason="this processor has no exact products of bytes")),
    pytest.param(lambda weight, bias: Widened(weight, bias), torch.float32, id="widened-float32", marks=needs_floats),
    pytest.param(lambda weight, bias: Widened(weight.bfloat16(), bias.bfloat16()), torch.bfloat16, id="widened-bfloat16",
                 marks=needs_floats),
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(97, 48), (129, 257), (320, 640), (33, 40_000)], ids=str)
@pytest.mark.parametrize(("made", "dtype"), BY_ROW)
def test_where_a_form_goes_by_row_the_bits_of_a_row_depend_on_that_row_alone(made, dtype, shape, threads):
    """The last shape is of rows so long that only a few of them are multiplied at a time."""
    before = torch.get_num_threads()
    x, residual = drawn(80, shape[1], dtype=dtype), drawn(80, shape[0], dtype=dtype, seed=2)
    form = made(drawn(*shape, seed=1), drawn(shape[0], seed=3))
    assert form.by_row
    whole, added = form(x, torch.float32), form.added_to(residual, x)
    try:
        torch.set_num_threads(threads)
        for rows in (slice(0, 1), slice(7, 8), slice(3, 7), slice(11, 28), slice(16, 80)):
            assert torch.equal(form(x[rows], torch.float32), whole[rows])
            assert torch.equal(form.added_to(residual[rows], x[rows]), added[rows])
        assert torch.equal(form(x.flip(0), torch.float32).flip(0), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("form", "dtype"), [form for form in FORMS if form.values[0] is not Packed])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_found_again(form, dtype, shape):
    weight = drawn(*shape, dtype=dtype)
    numbers = torch.tensor([0, shape[0] - 1, shape[0] // 2, 0])
    assert torch.equal(form(weight).rows(numbers), weight[numbers])


def test_sums_that_32_bits_cannot_hold_are_not_left_to_them():
    columns = (1 << 31) // (255 * 127) + 1
    form, stands_for = int8_of(torch.ones(1, columns))
    x = torch.ones(2, columns)
    assert_within_steps(form(x), x, stands_for, 0)
    assert form(x)[0, 0].item() == pytest.approx(columns, rel=1e-3)


# What oneDNN is told it runs on, in a process of its own: without VNNI it saturates, and that is found out.
OLD = """
import torch
from tts_engine.models.linear import Int8, multiplies_bytes
weight = torch.full((64, 128), 127, dtype=torch.int8)
form = Int8(weight, torch.ones(64), weight.sum(1).float())
print(multiplies_bytes(), set(form(torch.full((3, 128), 2.0)).flatten().tolist()))
"""


@pytest.mark.skipif(not multiplies_bytes() or torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512 with VNNI")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_a_processor_without_products_of_bytes_gets_them_from_floats(isa):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", OLD], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"False {{{2.0 * 127 * 128}}}\n"


@needs_packing
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "floats"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=str)
def test_what_is_fastest_is_chosen_by_processor_dtype_and_size(monkeypatch, dtype, pairs):
    monkeypatch.setattr(linear._C, "multiplies_pairs", lambda: pairs)
    monkeypatch.setattr(linear._C, "multiplies_floats", lambda: True)
    entries = linear.PACKED_FROM[dtype]
    by_size = [float_form(number, dtype, "cpu") for number in (entries - 1, entries)]
    assert by_size == ([Widened, Widened] if dtype == torch.bfloat16 and not pairs else [Plain, Packed])
    assert float_form(entries, dtype, "cpu", deterministic=True) is Widened and float_form(entries, dtype, "cuda") is Plain
    monkeypatch.setattr(linear._C, "multiplies_floats", lambda: False)
    assert [float_form(number, dtype, "cpu", deterministic=True) for number in (entries - 1, entries)] == [Plain, Packed]
