"""What every test stands on: Triton interpreted where there is no GPU, and the developers' shared data where it exists."""

import os
from pathlib import Path

import pytest

# Triton reads this when a kernel is decorated, so it is set before any test module can import one.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--soak", type=int, default=1, metavar="TIMES", help="so many times the usual number of examples")


@pytest.fixture(scope="session")
def soak(request) -> int:
    """How many times as long as usual a test that can be longer should be."""
    return request.config.getoption("--soak")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Benchmarks, tokenizers and configs that developers keep beside the repository; nothing of it is copied into it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the developers' shared data at {SHARED}")
    return SHARED
