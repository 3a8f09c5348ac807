"""One process of bench/gpu.py: parts, one after the other, each guarded; what they find goes as JSON lines to a file descriptor.

python -m bench.device.worker '{"parts": {"attention": 60.0}, "device": "cuda", "sizes": "full", "directory": "...", "events": 5}'
"""

import gc
import json
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping
from importlib import import_module, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BROKEN = 3  # exit status where a device answers no more: other parts want another process


def name_kernels() -> None:
    """Make tts_kernels importable where the package is not installed."""
    if util.find_spec("tts_kernels") is None:
        package = types.ModuleType("tts_kernels")
        package.__path__ = [str(ROOT / "kernels")]
        sys.modules["tts_kernels"] = package


def run(parts: Mapping[str, float], device: str, sizes: str, directory: Path, told: Callable[[dict[str, Any]], None],
        until: float = float("inf")) -> int:  # fmt: skip
    """Parts by name, each with the seconds it may take, none beyond `until` of time.monotonic(); the exit status."""
    import torch

    from .parts import PARTS
    from .setting import SIZES, Bench

    for name, seconds in parts.items():
        told({"event": "begin", "part": name})
        began, error = time.monotonic(), None

        def noted(event: dict[str, Any], name: str = name) -> None:
            told({"part": name} | event)

        try:
            room, _, function = PARTS[name].run.partition(":")
            bench = Bench(device, SIZES[sizes], directory, noted, min(until, began + seconds))
            getattr(import_module(f".{room}", __package__), function)(bench, *PARTS[name].given)
            bench.settle()
        except Exception:
            error = traceback.format_exc()
        told({"event": "end", "part": name, "seconds": time.monotonic() - began, "error": error})
        gc.collect()
        if torch.device(device).type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return BROKEN
    return 0


def main(settings: dict[str, Any]) -> int:
    name_kernels()
    with os.fdopen(settings.pop("events"), "w") as events:

        def told(event: dict[str, Any]) -> None:
            events.write(json.dumps(event, default=str) + "\n")
            events.flush()

        return run(**settings | {"directory": Path(settings["directory"])}, told=told)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
