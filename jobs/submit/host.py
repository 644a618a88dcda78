"""What every process of a job does first on its host. Imports nothing that a host might lack."""

import os
import signal
import sys
from pathlib import Path

SETUP = f"{__name__}.set_up_process"
"""The name by which Ray finds the function."""


def set_up_process() -> None:
    """Give a job's command, which Ray starts from this process, what it would have in a shell of its own."""
    _prefer_own_python()
    _hear_interrupts()


def _prefer_own_python() -> None:
    # `python` is to be the interpreter that runs Ray, as in an activated environment: a head that was started as
    # `.venv/bin/ray start` has another one on its PATH, or none.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _hear_interrupts() -> None:
    # A head that was started in the background of a script ignores SIGINT, and so would all that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
