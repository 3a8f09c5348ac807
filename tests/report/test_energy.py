"""The driver's counter of joules, with a made-up driver: no test needs a GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from tts_engine.report import energy


class Driver:
    """What of NVML is asked: 0 means well."""

    def __init__(self, init=0, found=0, told=0):
        self.init, self.found, self.told, self.millijoules, self.asked = init, found, told, 5_000, []

    def nvmlInit_v2(self):
        return self.init

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        self.asked.append(name)
        handle._obj.value = 77
        return self.found

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, spent):
        assert handle.value == 77
        spent._obj.value = self.millijoules
        return self.told


@pytest.fixture
def driver(monkeypatch):
    """driver(Driver | OSError): what opening the driver's library comes to."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-ab"))
    energy._meter.cache_clear()

    def use(found):
        def opened(name):
            assert name == energy.NVML
            if isinstance(found, OSError):
                raise found
            return found

        monkeypatch.setattr(ctypes, "CDLL", opened)

    yield use
    energy._meter.cache_clear()


def test_joules_are_those_of_the_driver_now(driver):
    made = Driver()
    driver(made)
    assert energy.joules("cuda:0") == 5.0
    made.millijoules = 7_250
    assert energy.joules("cuda") == 7.25
    assert made.asked == [b"GPU-1234-ab"]


@pytest.mark.parametrize("found", [OSError(), Driver(init=1), Driver(found=2), Driver(told=3)], ids=["none", "init", "gpu", "old"])
def test_there_are_none_where_nobody_counts(driver, found):
    driver(found)
    assert energy.joules("cuda") is None


def test_a_cpu_has_no_such_counter():
    assert energy.joules("cpu") is None
