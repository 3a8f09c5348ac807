"""Attention over the KV tree: `base` says what a backend is, `reference` what it must compute."""

from collections.abc import Iterable

import torch

from ..errors import EngineError
from .base import AttentionBackend
from .native import NativeAttention
from .per_branch import PerBranchAttention
from .reference import ReferenceAttention
from .triton_tree import TritonBlindAttention, TritonTreeAttention

_KNOWN = (ReferenceAttention, PerBranchAttention, NativeAttention, TritonTreeAttention, TritonBlindAttention)
BACKENDS = {backend.name: backend for backend in _KNOWN}


def make_backend(name: str, device: torch.device | str = "cpu", *, deterministic: bool = False) -> AttentionBackend:
    """A backend of that name for one model, its plans on `device`; with `deterministic`, no token's bits depend on its batch.

    Raises EngineError for an unknown name, and for a backend that is not made for the device or cannot be deterministic.
    """
    if name not in BACKENDS:
        raise EngineError(f"no attention backend {name!r}; known: {', '.join(sorted(BACKENDS))}")
    backend = BACKENDS[name]
    if str(device).partition(":")[0] not in backend.devices:
        raise EngineError(f"attention backend {name!r} runs on {' or '.join(backend.devices)} only, not on {device}")
    if deterministic and not backend.batch_invariant:
        able = " or ".join(sorted(repr(other.name) for other in BACKENDS.values() if other.batch_invariant))
        raise EngineError(f"attention backend {name!r} is not batch-invariant; deterministic=True needs {able}")
    return backend(device, deterministic=deterministic)


def refuse_windows(backend: AttentionBackend, windows: Iterable[int | None], model: str) -> None:
    """Raise EngineError where a layer of `model` has a sliding window and the backend has none."""
    window = next((w for w in windows if w is not None), None)
    if window is not None and not backend.has_windows:
        able = " or ".join(sorted(other.name for other in BACKENDS.values() if other.has_windows))
        raise EngineError(f"{model} attends within a sliding window of {window} tokens, which attention backend {backend.name!r} "
                          f"does not have: use {able}")  # fmt: skip
