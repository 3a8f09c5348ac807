"""Builds the C++ extension, maps the kernels; the rest is in pyproject.toml. Needs setuptools and pybind11, never torch."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

ParallelCompile().install()  # on as many cores as there are

setup(
    # kernels/ must not be importable by that name (see tests/test_packaging.py): it has no __init__.py and goes by another one.
    packages=[*find_packages(include=["tts_engine", "tts_engine.*"]), "tts_kernels"],
    package_dir={"tts_kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "tts_engine._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # A product and a sum that follow each other are one instruction wherever there is one; and no integer overflows, which
            # Python's own flags would have the kernels' loops provide for.
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=fast", "-fno-wrapv", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ],
)
