"""What a user installs and what must never be in it."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tts_engine

sys.path.append(str(Path(__file__).parent))  # for the faults, which are no test

import faults  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_py_typed_ships():
    assert (ROOT / "tts_engine" / "py.typed").is_file()
    assert "py.typed" in CONFIG["tool"]["setuptools"]["package-data"]["tts_engine"]


def test_the_package_and_its_metadata_name_one_version():
    assert tts_engine.__version__ == CONFIG["project"]["version"]


def test_help_imports_no_torch():
    out = python("-X", "importtime", "-m", "tts_engine", "--help")
    assert out.returncode == 0 and "usage" in out.stdout.lower(), out.stderr.splitlines()[-1]
    timed = [line for line in out.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in timed}
    assert "tts_engine" in imported
    assert not imported & {"torch", "transformers"}


def test_the_build_needs_setuptools_and_pybind11_only():
    assert {Requirement(line).name for line in CONFIG["build-system"]["requires"]} == {"setuptools", "pybind11"}
    imports = re.findall(r"^\s*(?:from|import)\s+(\w+)", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert set(imports) - sys.stdlib_module_names == {"setuptools", "pybind11"}


def test_the_extension_says_how_to_build_it_where_it_is_missing():
    command = "import sys; sys.modules['tts_engine._C'] = None; import tts_engine.kv.tree"
    out = python("-c", command)
    assert out.returncode != 0 and "pip install -e ." in out.stderr.splitlines()[-1]


def test_kernels_go_by_another_name_and_are_no_package():
    """transformers looks for a distribution called `kernels`; an importable package of that name would break its imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    setup = ast.parse((ROOT / "setup.py").read_text())
    (mapping,) = [word.value for word in ast.walk(setup) if isinstance(word, ast.keyword) and word.arg == "package_dir"]
    assert ast.literal_eval(mapping) == {"tts_kernels": "kernels"}
    command = "import sys; from transformers.utils import is_kernels_available; sys.exit(is_kernels_available())"
    out = python("-c", command)
    assert out.returncode == 0, out.stderr


def test_triton_comes_with_the_gpu_extra_alone():
    """The CPU library does without, and nothing imports the kernels before a GPU's backend is asked for."""
    assert "triton" not in {Requirement(line).name for line in CONFIG["project"]["dependencies"]}
    assert [Requirement(line).name for line in CONFIG["project"]["optional-dependencies"]["gpu"]] == ["triton"]
    out = python("-c", "import sys, tts_engine.engine; sys.exit('tts_kernels' in sys.modules)")
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("words", ["trust_remote_code=True", "import pickle", "torch.load(", "yaml.load("])
def test_nothing_that_runs_what_a_file_says(words):
    able = {"torch.load(": ["convert.py"]}  # with weights_only=True; tests/models/test_convert.py sees to that
    assert [path.name for path in (ROOT / "tts_engine").rglob("*.py") if words in path.read_text()] == able.get(words, [])


def test_constraints_satisfy_the_bounds_of_the_package():
    extras = CONFIG["project"]["optional-dependencies"]
    required = [Requirement(line) for line in CONFIG["project"]["dependencies"]]
    required += [Requirement(line) for extra in ("grade", "plot", "gpu", "test") for line in extras[extra]]
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    for need in required:
        if need.name != "tts-engine":
            assert need.specifier.contains(pins[canonicalize_name(need.name)]), f"{need} is pinned to {pins[need.name]}"
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.6.0")


def test_every_package_is_pinned_by_name_and_version_alone():
    for name, version in PINS.items():
        assert re.fullmatch(r"[\w.-]+", name) and re.fullmatch(r"[\w.]+", version), f"{name}=={version}"


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_that_is_to_be_planted_has_its_one_place(fault):
    """`make faults` takes a quarter of an hour: that it can be done at all is seen here."""
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1 and fault.new != fault.old
    file, _, test = fault.test.partition("::")
    assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")
