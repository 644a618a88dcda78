"""The figures of the host have MLflow's names and units, and cost a step next to nothing."""

import mmap
import os
import sys
import time
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from pipelines.train.usage import Usage


def test_the_figures_of_the_host_are_those_of_mlflows_own_monitor() -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    usage, theirs = Usage(), {}
    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    assert usage.host() == {}, "too soon to tell a share of time"
    time.sleep(0.3)
    for monitor in monitors:
        monitor.collect_metrics()
        theirs |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
    ours = usage.host()
    assert {name for name in ours if "gpu" not in name} == theirs.keys()
    for name in ("system/disk_usage_megabytes", "system/disk_usage_percentage", "system/system_memory_usage_megabytes"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.2), name
    assert usage.host() == {}, "every ten seconds"


def test_the_memory_of_the_process_is_in_bytes_and_its_peak_stays() -> None:
    usage = Usage()
    before = usage.process()
    assert before["memory_bytes"] == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.05)
    block = mmap.mmap(-1, 200_000_000)  # not of memory that the process had freed and kept
    block.write(b"x" * 200_000_000)
    assert usage.process() == before, "looked at once a second"
    time.sleep(1.1)
    held = usage.process()
    assert held["memory_bytes"] - before["memory_bytes"] > 190_000_000
    block.close()
    time.sleep(1.1)
    after = usage.process()
    assert after["memory_bytes"] < held["memory_bytes"] - 100_000_000
    assert after["memory_peak_bytes"] >= held["memory_bytes"]


def test_gpus_are_told_by_mlflows_names_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's library is stood in for: there need be no GPU here. MLflow's monitor reads from the same."""
    stand_in = ModuleType("pynvml")
    calls = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=(gpu + 1) * 2e9, total=8e9),
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=70 + gpu),
        "nvmlDeviceGetPowerUsage": lambda gpu: 150_000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 300_000,
        "NVMLError": type("NVMLError", (Exception,), {}),
    }
    for name, call in calls.items():
        setattr(stand_in, name, call)
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    from mlflow.system_metrics.metrics import gpu_monitor

    monkeypatch.setattr(gpu_monitor, "pynvml", stand_in, raising=False)
    monitor, usage = gpu_monitor.GPUMonitor(), Usage()
    monitor.collect_metrics()
    time.sleep(0.3)
    told = {name: value for name, value in usage.host().items() if name.startswith("system/gpu_")}
    assert told == {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
    assert told["system/gpu_1_memory_usage_percentage"] == 50


def test_a_host_that_hides_its_figures_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not in this sandbox")

    for name in ("cpu_percent", "net_io_counters", "virtual_memory", "disk_usage"):
        monkeypatch.setattr(psutil, name, refuse)
    monkeypatch.setattr(psutil.Process, "memory_info", refuse)
    usage = Usage()
    time.sleep(0.3)
    assert (usage.host(), usage.process()) == ({}, {})
