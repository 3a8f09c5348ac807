"""Attention over the KV tree: `base` says what a backend is, `reference` what it must compute."""

from collections.abc import Iterable

import torch

from ..errors import EngineError
from .base import AttentionBackend
from .per_branch import PerBranchAttention
from .reference import ReferenceAttention

BACKENDS = {backend.name: backend for backend in (ReferenceAttention, PerBranchAttention)}


def make_backend(name: str, device: torch.device | str = "cpu") -> AttentionBackend:
    """The backend of that name, its plans on `device`. Raises EngineError for an unknown name."""
    if name not in BACKENDS:
        raise EngineError(f"no attention backend {name!r}; known: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name](device)


def refuse_windows(backend: AttentionBackend, windows: Iterable[int | None], model: str) -> None:
    """Raise EngineError where a layer of `model` has a sliding window and the backend has none."""
    window = next((w for w in windows if w is not None), None)
    if window is not None and not backend.has_windows:
        able = " or ".join(sorted(other.name for other in BACKENDS.values() if other.has_windows))
        raise EngineError(f"{model} attends within a sliding window of {window} tokens, which attention backend {backend.name!r} "
                          f"does not have: use {able}")  # fmt: skip
