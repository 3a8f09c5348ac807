"""The small trained models that ship with the package: three policies and two PRMs for the embedded task."""

from pathlib import Path

from ..errors import ModelError

NAMES = ("policy-s", "policy-m", "policy-l", "prm-good", "prm-poor")
MODELS = Path(__file__).parent / "models"
BLOCK_SIZE = 8  # their steps are a dozen tokens


def model_path(name: str) -> Path:
    """The directory of an embedded model. Raises ModelError for a name that is none."""
    if name not in NAMES:
        raise ModelError(f"no embedded model {name!r}; known: {', '.join(NAMES)}")
    return MODELS / name
