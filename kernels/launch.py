"""One launch of a kernel as a value: what runs on a device and what is compiled without one are made from the same arguments."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

if triton.knobs.runtime.interpret:
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_bounds(tensor: Any, scope: Any) -> None:
        """Scalars of Triton 3.6's interpreter are arrays of one element, which NumPy 2.4 no longer takes for bounds of a loop."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    kernel: Any  # a @triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by parameter: tensors, and Python values of its constexprs
    capability: int  # compute capability of the GPU: 90 is Hopper
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    def compiled(self) -> CompiledKernel:
        """What `run` would compile on such a GPU, which need not be there.

        The JIT's own binder reads types, constexprs and alignments off the arguments; tensors of any content on a CPU will do.
        """
        target = GPUTarget("cuda", self.capability, 32)
        backend = make_backend(target)
        keywords = {**self.options, "debug": False, "instrumentation_mode": ""}
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(**self.arguments, **keywords)
        options, signature, constexprs, attrs = self.kernel._pack_args(backend, keywords, bound, specialization, options)
        return triton.compile(ASTSource(self.kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def capability(device: torch.device) -> int:
    """Of that GPU; Hopper's for the interpreter, which has none."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor
