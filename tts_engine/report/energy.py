"""Joules that a GPU takes, as its driver counts them."""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

NVML = "libnvidia-ml.so.1"  # comes with the driver


def joules(device: str) -> float | None:
    """What the device has taken since its driver was loaded, whoever made it work; None where there is nobody who counts."""
    if torch.device(device).type != "cuda":
        return None
    return _meter(str(torch.cuda.get_device_properties(device).uuid))()


@cache
def _meter(uuid: str) -> Callable[[], float | None]:
    """Reads the counter of the GPU of that name, where PyTorch's number of it means nothing: it has numbers of its own."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return lambda: None
    handle, spent = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle)):
        return lambda: None

    def read() -> float | None:
        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(spent))
        return None if failed else spent.value / 1e3

    return read
