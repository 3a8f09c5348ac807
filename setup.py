"""Builds the C++ extension; everything else is in pyproject.toml. Needs setuptools and pybind11, never torch."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "tts_engine._C",
            sources=["csrc/bindings.cpp", "csrc/kv_tree.cpp"],
            depends=["csrc/kv_tree.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ]
)
