"""Builds the C++ extension; everything else is in pyproject.toml. Needs setuptools and pybind11, never torch."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile().install()  # on as many cores as there are

setup(
    ext_modules=[
        Pybind11Extension(
            "tts_engine._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # A product and a sum that follow each other are one instruction wherever there is one.
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=fast", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ]
)
