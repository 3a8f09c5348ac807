"""The kernels' machine code for GPUs that need not be there: nothing spills, and the instructions that were meant are in it."""

import json
import os
import subprocess
import sys

from tts_kernels.tree_attention import resident

SHARED_MEMORY = {90: 232_448, 80: 166_912}  # bytes a program can have
MULTIPROCESSOR = {90: 233_472, 80: 167_936}  # and all programs of a multiprocessor, 1 KB of each for the driver among them
REGISTERS = 65_536  # of a multiprocessor; a warp has them in steps of 256


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
            tiles, dim = code["kernel"].split()[1].split("x")
            classes = [int(rows) for rows in tiles.split("+")]
            assert code["16-byte copies"], code
            wide, narrow = capability == 90 and classes[0] >= 64, capability == 80 or classes[-1] < 64
            assert bool(code["HGMMA"]) == wide and bool(code["HMMA"]) == narrow, code
            programs = resident(classes[0], int(dim), capability)  # what a plan counts on
            assert programs * code["warps"] * (-(-code["REG"] // 8) * 256) <= REGISTERS, code
            assert programs * (code["shared"] + 1024) <= MULTIPROCESSOR[capability], code
