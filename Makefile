# Needs Python 3.11 to 3.13 with pip, a C++17 compiler and make. Everything is installed into .venv; runs after the first skip what is done.
PYTHON ?= python3
PIP = .venv/bin/python -m pip

.PHONY: demo test faults soak bench study kernels gpu

demo: .venv/.installed
	.venv/bin/tts-engine demo

test: .venv/.installed
	.venv/bin/python -m pytest -q tests

faults: .venv/.installed
	.venv/bin/python tests/faults.py

soak: .venv/.installed
	.venv/bin/python -m pytest -q tests/kv tests/embedded tests/tasks tests/prm tests/kernels/test_compiled.py --soak 10
	.venv/bin/python -m pytest -q tests/test_bad_input.py -k mutated --soak 286
	.venv/bin/python -m pytest -q tests/test_engine.py -k "whatever_searches_meet or any_two_lines" --soak 500

bench: .venv/.installed
	.venv/bin/python -m pytest -q bench

study: .venv/.installed
	.venv/bin/python bench/study/study.py

kernels: .venv/.installed
	.venv/bin/python -m tts_kernels.compiled

# With the Python at hand: a bare GPU machine has torch, and no network to install anything from.
gpu:
	$(PYTHON) bench/gpu.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f"tts_engine needs Python 3.11 to 3.13 and $(PYTHON) is {v[0]}.{v[1]}: name another, as in make test PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# The GPU build of torch insists on a triton other than the pinned one, so that pin holds only where pip finds the CPU build.
.venv/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*) | .venv/bin/python
	@if $(PIP) install -q --dry-run --no-deps "$$(grep '^torch==' constraints.txt)+cpu" 2> /dev/null; \
	then cp constraints.txt .venv/constraints.txt; \
	else echo "No CPU build of torch found: taking the default build, with its own triton"; \
	     grep -v '^triton==' constraints.txt > .venv/constraints.txt; fi
	$(PIP) install -c .venv/constraints.txt -e '.[test]'
	touch $@
