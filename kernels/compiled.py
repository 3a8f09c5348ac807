"""What the kernels become on a GPU that need not be there: registers, shared memory and instructions, read from the machine code.

`python -m tts_kernels.compiled` prints them, one a line; `few` those alone that every run of the tests looks at.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from . import advance, fp8_rows, lm_head_sample, merge, prm_score, rms_norm, sample, store_kv, swiglu, tree_attention
from .launch import Launch

CAPABILITIES = (90, 80)
SHAPES = ((32, 8, 64), (28, 4, 128))  # H, K, D: Llama-3.2-1B, Qwen2.5-7B
FEW = ("tree_attention 64+16x64 sm_90", "tree_attention 64+16x128 sm_90", "tree_attention 64+16x128 sm_80", "sample sm_90",
       "choose restricted sm_80", "store_kv 128 normed sm_90", "fp8_rows 3584 sm_90")  # fmt: skip


def variants() -> Iterator[tuple[str, Launch]]:
    """Every kernel by the classes of tiles, heads and devices that it is made for, with arguments of the right types."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    for cc in CAPABILITIES:
        for heads, kv_heads, dim in SHAPES:
            q = torch.zeros(4, heads + kv_heads, dim, dtype=torch.bfloat16)[:, :heads]
            k, v = (torch.zeros(16, kv_heads, dim, dtype=q.dtype) for _ in "kv")
            out, partial, lse = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(4, heads, dim), torch.zeros(4, heads)
            tables = tree_attention.Tables(order=ints(4), slots=ints(16), segments=ints(4, 6), grown=ints(4), items=ints(4, 5),
                                           merges=ints(4, 4), merge_slots=ints(4), counts=ints(2), num_partials=4)  # fmt: skip
            for tiles in (*((rows,) for rows in tree_attention.ROWS), (64, 16)):
                yield (
                    f"tree_attention {'+'.join(map(str, tiles))}x{dim} sm_{cc}",
                    tree_attention.prepare(q, k, v, out, partial, lse, tables, rows=tiles[0], tail_rows=tiles[-1], num_programs=4,
                                           capability=cc),
                )  # fmt: skip
            yield (
                f"merge {dim} sm_{cc}",
                merge.prepare(
                    partial, lse, out, tables.order, tables.merges, tables.merge_slots, tables.counts, num_programs=4, capability=cc
                ),
            )

            wide = torch.zeros(4, heads * dim, dtype=q.dtype)
            at, scores, direction = torch.zeros(4, dtype=torch.int64), torch.zeros(4), torch.zeros(heads * dim)
            yield (
                f"prm_score {heads * dim} sm_{cc}",
                prm_score.prepare(wide, at, direction, scores, norm=wide[0], epsilon=1e-5, offset=0.0, relu=False, capability=cc),
            )
            qkv = torch.zeros(4, heads + 2 * kv_heads, dim, dtype=q.dtype)
            cos, sin = (torch.zeros(4, dim // 2) for _ in "cs")
            yield f"store_kv {dim} sm_{cc}", store_kv.prepare(qkv, cos, sin, at, out, k, v, capability=cc)
            yield (
                f"store_kv {dim} normed sm_{cc}",
                store_kv.prepare(qkv, cos, sin, at, out, k, v, norm=qkv[0, : heads + kv_heads], epsilon=1e-6, capability=cc),
            )
            yield f"store_kv {dim} queries sm_{cc}", store_kv.prepare(qkv, cos, sin, None, qkv, None, None, capability=cc)
            yield f"rms_norm {heads * dim} sm_{cc}", rms_norm.prepare(wide, wide[0], wide, 1e-6, capability=cc)
            yield f"rms_norm {heads}x{dim} sm_{cc}", rms_norm.prepare(out, out[0], out, 1e-6, capability=cc)
            yield f"swiglu {heads * dim // 2} sm_{cc}", swiglu.prepare(wide, wide[:, ::2].contiguous(), capability=cc)
            yield f"fp8_rows {heads * dim} sm_{cc}", fp8_rows.prepare(wide, wide.char(), scores, 1e-30, capability=cc)
            for draws in lm_head_sample.ROWS:
                place, partial = torch.zeros(draws, dtype=torch.int64), torch.zeros(sample.PLANES, draws, 4)
                given = place, ints(draws, 2), place, place, torch.zeros(draws)
                yield (
                    f"lm_head_sample {draws}x{heads * dim} sm_{cc}",
                    lm_head_sample.prepare(wide, wide, *given, partial, logprob=True, capability=cc),
                )
        numbers, one = {name: at for name in ("token", "position", "next_position", "slot")}, ints(4)
        rows = advance.Rows(**numbers, slots=at[None].repeat(3, 1), state=one, room=one, grown=one, drawn=one, stop=one,
                            tokens=ints(2, 4))  # fmt: skip
        for after in (torch.zeros(5, 128_256, dtype=torch.uint8), None):
            yield (
                f"advance {'counts' if after is None else 'table'} sm_{cc}",
                advance.prepare(rows, at, after, torch.zeros(128_256, dtype=torch.uint8), last_state=2, capability=cc),
            )
        logits, logprobs, given = torch.zeros(4, 128_256), torch.zeros(4), (at, ints(4, 2), at, at, torch.zeros(4))
        partial, limits = torch.zeros(sample.PLANES, 4, sample.num_pieces(128_256)), (ints(4), torch.zeros(4), torch.zeros(4))
        yield f"sample sm_{cc}", sample.prepare(logits, *given, partial, logprob=True, capability=cc)
        yield f"choose sm_{cc}", sample.prepare_choice(partial, at, logprobs, capability=cc)
        yield (
            f"choose restricted sm_{cc}",
            sample.prepare_choice(partial, at, logprobs, logits, given, limits, capability=cc),
        )


def resources(launch: Launch) -> dict[str, Any]:
    """Registers and bytes of stack a thread, bytes of shared memory a program, and how often instructions stand in the code."""
    compiled = launch.compiled()
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    found |= {"shared": compiled.metadata.shared, "warps": launch.num_warps}
    names = [match[1] for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code)]
    found["instructions"] = len(names)
    found["16-byte copies"] = sum(name.startswith("LDGSTS") and name.endswith("128") for name in names)
    for name in ("HGMMA", "HMMA", "LDL", "STL"):
        found[name] = sum(one.split(".")[0] == name for one in names)
    return found


def main(which: str) -> None:
    for name, launch in variants():
        if which == "all" or name in FEW:
            print(json.dumps({"kernel": name, **resources(launch)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "all")
