"""What every test stands on: Triton interpreted where there is no GPU, the developers' shared data where it exists, tiny models."""

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


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory with a small policy and a small PRM of random weights."""
    from tts_engine.testing import random_policy_directory, random_prm_directory

    directory = tmp_path_factory.mktemp("models")
    random_policy_directory(directory / "policy")
    random_prm_directory(directory / "prm", "math-shepherd")
    return directory


@pytest.fixture
def run(capfd):
    """A command as its user's shell sees it: argv -> (exit code, standard output, standard error)."""
    from tts_engine import cli

    def call(*argv):
        try:
            code = cli.main([str(argument) for argument in argv])
        except SystemExit as left:
            code = left.code
        return code, *capfd.readouterr()

    return call
