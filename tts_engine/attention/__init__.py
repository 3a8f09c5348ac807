"""Attention over the KV tree: `base` says what a backend is, `reference` what it must compute."""

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
