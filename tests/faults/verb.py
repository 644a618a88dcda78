"""A verb of `ddpm` as somebody else's process: started again and again, watched from outside, killed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

PATIENCE_SECONDS = 180.0
"""Longest wait for anything but the verb's end, on a machine that does other things beside."""
ENDS_SECONDS = 600.0
LINGERS_SECONDS = 90.0
"""Longest life of Ray's processes after that of the command that started them: what computes ends within seconds, but
the two agents look for their dead Ray for a minute."""
LOOK_SECONDS = 0.01
_FAMILY_LOOK_SECONDS = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """How the command ended."""

    code: int
    result: dict[str, Any]
    """What `--json` prints; empty where it failed."""
    said: str
    """What it wrote to stderr."""


class Verb:
    """`ddpm WORDS --json`, whose output is kept in files beside `mark`."""

    def __init__(self, words: list[str], mark: Path, environment: dict[str, str] | None = None) -> None:
        self._words, self._mark, self._environment = words, mark, environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[psutil.Process] = set()
        self._watching: threading.Thread | None = None
        self._log = mark.with_name(f"{mark.name}.log")
        self._told = 0

    def start(self, *options: str) -> None:
        """Start the command, as the same one that was ended before."""
        assert not self.is_running()
        words = [sys.executable, "-m", "jobs", *self._words, "--json"]
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DDPM_", "MLFLOW_"))}
        self._told = self._log.stat().st_size if self._log.exists() else 0
        with open(self._log, "ab") as log, open(self._result, "wb") as result:
            self._process = subprocess.Popen(
                [*words, *options],
                env={**ours, **self._environment},
                stdout=result,
                stderr=log,
                start_new_session=True,
            )
        self._watching = threading.Thread(target=self._watch, args=(self._process,), daemon=True)
        self._watching.start()

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Know all that descends from a process, for when it has ended nobody can tell any more."""
        while process.poll() is None:
            self.family()
            time.sleep(_FAMILY_LOOK_SECONDS)

    @property
    def _result(self) -> Path:
        return self._mark.with_name(f"{self._mark.name}.json")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """What it wrote to stderr since the last start."""
        return self._log.read_bytes()[self._told :].decode(errors="replace")

    def end(self, timeout: float = ENDS_SECONDS) -> Ended:
        """Wait for its end."""
        code = self.process.wait(timeout)
        lines = self._result.read_text().splitlines()
        return Ended(code, json.loads(lines[-1]) if lines else {}, self.said())

    def finish(self) -> Ended:
        """Wait for its end, which must be a good one."""
        ended = self.end()
        assert ended.code == 0, ended.said
        return ended

    def family(self) -> set[psutil.Process]:
        """The command's process and all that descend from it, now and at earlier looks."""
        if self._process is not None:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(self._process.pid)
                self._family = self._family | {process, *process.children(recursive=True)}  # a thread does so, too
        return self._family

    def kill(self) -> None:
        """SIGKILL to the command; what it started has not ended yet."""
        self.family()
        self.process.kill()
        self.process.wait()

    def put_away(self) -> None:
        """Kill what is left of it, of a test that failed."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait()


def wait_for(look: Callable[[], T | None], what: str, of: Verb, seconds: float = PATIENCE_SECONDS) -> T:
    """What `look` finds at last, while the command lives."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert of.process.poll() is None, f"ended with {of.process.poll()} before {what}: {of.said()}"
        assert time.monotonic() < end, f"no sign of {what} in {seconds:g} s: {of.said()}"
        time.sleep(LOOK_SECONDS)
    return found


def end_by(number: signal.Signals, process: psutil.Process) -> None:
    """Send a signal that ends the process, and wait for that."""
    process.send_signal(number)
    psutil.wait_procs([process], timeout=LINGERS_SECONDS)
    assert not is_alive(process), f"{process} outlived {number.name}"


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(family: set[psutil.Process]) -> None:
    """None of them lingers."""
    end = time.monotonic() + LINGERS_SECONDS
    while left := [process for process in family if is_alive(process)]:
        assert time.monotonic() < end, f"these live on: {left}"
        time.sleep(0.1)


def a_while(moments: random.Random, seconds: float) -> None:
    """Let a time pass that is drawn from 0 to so much."""
    time.sleep(moments.uniform(0, seconds))
