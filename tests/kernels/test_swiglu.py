"""The gate against the definition, at the ends of what an exponential can be too."""

import pytest
import torch

from tts_engine.models.ops import TorchOps
from tts_kernels import swiglu as room
from tts_kernels.swiglu import swiglu

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3}  # of the size of an element: an exponential, or two roundings


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter's exponential, on the way to a gate that is shut
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (3, 33), (2, room.BLOCK), (2, room.BLOCK + 1)])
def test_a_gate_opens_as_defined(rows, width, dtype):
    gate_up = (3 * torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width))).to(dtype)
    if rows:
        gate_up[0, 0], gate_up[-1, 0], gate_up[-1, width - 1] = 200.0, -200.0, 0.0
    out, ref = swiglu(gate_up), TorchOps().swiglu(gate_up)
    assert out.dtype == dtype and out.shape == (rows, width)
    torch.testing.assert_close(out, ref, rtol=BOUNDS[dtype], atol=torch.finfo(dtype).tiny)
