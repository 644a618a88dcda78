"""What training takes of its host: memory of the process; processors, memory, disk, network and GPUs of the host.

The names under `system/` and their units are those of MLflow's own monitor, whose UI shows them in a tab of their own.
That monitor writes to MLflow directly and gives up at the first request that fails; here the figures are the journal's,
and go where it goes.
"""

import contextlib
import math
import os
import resource
import sys
import time
from typing import Any

_EVERY_SECONDS = 10.0
_LEAST_SECONDS = 0.2
"""A share of processor time over less says nothing."""
_LOOK_SECONDS = 1.0
_MEGABYTE = 1e6


class Usage:
    """Of this process and its host, from now on."""

    def __init__(self) -> None:
        import psutil

        self._psutil, self._process = psutil, psutil.Process()
        self._gpus = _gpus()
        self._sampled_at, self._every = time.monotonic(), _LEAST_SECONDS
        self._looked_at, self._resident, self._peak = -math.inf, 0, 0
        self._errors = (psutil.Error, OSError, RuntimeError)
        """Of a sandbox that hides what is asked for, or of what a host does not have."""
        self._network_before: Any = None
        with contextlib.suppress(*self._errors):
            psutil.cpu_percent()  # which tells of the time since it was last asked
            self._network_before = psutil.net_io_counters()

    def process(self) -> dict[str, float]:
        """Resident memory of the process, now (looked at once a second at most) and at its highest; nothing where that
        cannot be learnt."""
        if (now := time.monotonic()) - self._looked_at >= _LOOK_SECONDS:
            try:
                self._resident = self._process.memory_info().rss
            except self._errors:
                return {}
            self._looked_at = now
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            self._peak = max(self._peak, peak, self._resident)  # the kernel's own may lag a little behind
        return {"memory_bytes": float(self._resident), "memory_peak_bytes": float(self._peak)}

    def host(self) -> dict[str, float]:
        """Figures of the host, soon after the start and then every ten seconds; nothing between, nor where they cannot
        be learnt."""
        now = time.monotonic()
        if now - self._sampled_at < self._every:
            return {}
        self._sampled_at, self._every = now, _EVERY_SECONDS
        try:
            return {f"system/{name}": float(value) for name, value in self._of_host().items()}
        except self._errors:  # no figure is worth a training
            return {}

    def _of_host(self) -> dict[str, float]:
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(os.sep)
        figures: dict[str, float] = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_available_megabytes": disk.free / _MEGABYTE,
        }
        if (network := self._psutil.net_io_counters()) and self._network_before:  # a sandbox may have none
            received = network.bytes_recv - self._network_before.bytes_recv
            sent = network.bytes_sent - self._network_before.bytes_sent
            figures["network_receive_megabytes"] = received / _MEGABYTE
            figures["network_transmit_megabytes"] = sent / _MEGABYTE
        for i, gpu in enumerate(self._gpus):
            figures |= {f"gpu_{i}_{name}": value for name, value in _of_gpu(gpu).items()}
        return figures


def _gpus() -> list[Any]:
    """Handles of this host's NVIDIA GPUs; none where there are none, or nvidia-ml-py is not installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no package, no driver, a driver of another version: no figures
        return []


def _of_gpu(gpu: Any) -> dict[str, float]:
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        watts = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return {
            "memory_usage_percentage": 100 * memory.used / memory.total,
            "memory_usage_megabytes": memory.used / _MEGABYTE,
            "utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "power_usage_watts": watts,
            "power_usage_percentage": 100 * watts * 1000 / pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu),
        }
    except pynvml.NVMLError:
        return {}
