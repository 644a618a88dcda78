"""What every process of a job does first on its host. Imports nothing that a host might lack."""

import os
import sys
from pathlib import Path

SETUP = f"{__name__}.prefer_own_python"
"""The name by which Ray finds the function."""


def prefer_own_python() -> None:
    """Make `python` mean the interpreter that runs Ray, as in an activated environment.

    Ray starts a job's command through the shell, and a head started as `.venv/bin/ray start` has another `python`, or
    none, on its PATH.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
