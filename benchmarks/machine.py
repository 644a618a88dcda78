"""What a measurement ran on, in words."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path


def describe(load: float, libraries: Sequence[str]) -> str:
    """The processor, the load (of a minute, when it began) and the versions of what ran."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    cpu = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return f"{cpu}, load {load:.1f} at the start; Python {platform.python_version()}, {versions}"


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []
