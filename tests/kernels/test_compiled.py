"""The kernels' machine code for GPUs that need not be there: nothing spills, and the instructions that were meant are in it."""

import json
import os
import subprocess
import sys

SHARED_MEMORY = {90: 232_448, 80: 166_912}  # bytes a program can have


def test_kernels_compile_to_what_was_meant(soak):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tts_kernels.compiled", "all" if soak > 1 else "few"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = [json.loads(line) for line in out.stdout.splitlines()]
    assert len(found) >= 3
    for code in found:
        kernel, capability = code["kernel"].split()[0], int(code["kernel"].rpartition("_")[2])
        assert not code["STACK"] and not code["LDL"] and not code["STL"], code
        assert code["shared"] <= SHARED_MEMORY[capability], code
        if kernel == "tree_attention":
            assert code["16-byte copies"], code
            wide = capability == 90 and not code["kernel"].split()[1].startswith("16x")
            assert bool(code["HGMMA"]) == wide and bool(code["HMMA"]) != wide, code
