import hashlib

import pytest

from tts_engine.ledger import Ledger, Phases, PolicyLedger, PRMLedger
from tts_engine.report.arms import RunRead

SIZES = {"small": 1000, "middle": 4000, "large": 9000}


def model(name, parameters=1000):
    return {
        "name": name,
        "parameters": parameters,
        "sha256": {"model.safetensors": hashlib.sha256(name.encode(errors="replace")).hexdigest()},
    }


@pytest.fixture
def run_of():
    """A run as its directory would have it. solved: by problem; flops: a problem, of the policy, and of the PRM if there is one."""

    def make(
        method, n, solved, flops, policy="small", prm=None, prm_flops=0, seed=0, name=None, task="sums", levels=(1, 2), **more
    ):
        settings = {"name": method} | ({"n": n} if method != "cot" else {}) | more.pop("settings", {})
        description = {
            "schema_version": 1,
            "task": {"name": task, "split": "test", "limit": None, "problems_sha256": task},
            "method": settings | {"rules": {"temperature": 0.7}, "max_steps": 40},
            "seed": seed,
            "engine": {"dtype": "float32", "max_rows": 512},
            "policy": model(policy, SIZES.get(policy, 1000)),
            "prm": None if prm is None else model(prm),
            "versions": {"tts-engine": "0.1.0"},
            "made": {"at": "2026-01-02T03:04:05Z"},
        }
        records = []
        for i, right in enumerate(solved):
            ledger = Ledger(
                policy=PolicyLedger(linear_flops=flops, ideal_flops=flops, tokens_generated=10 * n, kv_distinct_bytes=2000,
                                    kv_logical_bytes=4000),
                prm=PRMLedger(linear_flops=prm_flops, ideal_flops=prm_flops, tokens_computed=prm_flops // 100),
                seconds=0.5, phases=Phases(policy=0.3, prm=0.1, grading=0.1),
            )  # fmt: skip
            records.append({
                "id": f"p{i:03}", "level": levels[i % len(levels)] if levels else None, "method": settings, "seed": seed,
                "gold": "7", "answer": "7" if right else "8", "correct": bool(right), "aggregates": {}, "error": None,
                "seconds": 0.5, "ledger": ledger.as_dict(),
            } | more)  # fmt: skip
        return RunRead(name or f"{policy}-{prm or 'none'}-{method}-{n}-{seed}", description, records)

    return make


@pytest.fixture
def line_up(run_of):
    """Two policies, a PRM; of 40 problems 10, 20, 30 and so on are solved, the first ones always."""

    def share(part):
        return [i < part for i in range(40)]

    return [
        run_of("cot", 1, share(10), 1_000_000),
        run_of("majority", 4, share(20), 4_000_000),
        run_of("majority", 16, share(30), 16_000_000),
        run_of("beam", 4, share(30), 4_000_000, prm="judge", prm_flops=4_000_000),
        run_of("beam", 16, share(40), 16_000_000, prm="judge", prm_flops=16_000_000),
        run_of("cot", 1, share(20), 10_000_000, policy="large"),
    ]
