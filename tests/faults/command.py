"""`ddpm train` as somebody else's process, whose run is watched from outside and whose processes are killed."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from pipelines.store import MANIFEST, TEMPORARY, Place
from pipelines.train.run import Run
from tests.conftest import tiny_fields

PATIENCE_SECONDS = 180.0
"""Longest wait for anything but the run's end, on a machine that does other things beside."""
ENDS_SECONDS = 600.0
LINGERS_SECONDS = 90.0
"""Longest life of Ray's processes after that of the command that started them: what computes ends within seconds, but
the two agents look for their dead Ray for a minute."""
_LOOK_SECONDS = 0.01
_WRITE_LOOK_SECONDS = 0.0005
_FAMILY_LOOK_SECONDS = 1.0

T = TypeVar("T")

BATCH = 64
EVERY = 20


def write_spec(path: Path, steps: int, **overrides: Any) -> Path:
    """A spec of so many steps of some 50 ms, each of which the journal and the tracker tell of."""
    settings = {
        "train__images": steps * BATCH,
        "train__global_batch": BATCH,
        "train__checkpoint_every": EVERY,
        "train__log_every": 1,
        "train__oversubscribe": True,
    }
    fields = tiny_fields(**{**settings, **overrides})
    path.write_text(yaml.safe_dump(fields))
    return path


@dataclass(frozen=True)
class Ended:
    """How the command ended."""

    code: int
    result: dict[str, Any]
    """What `--json` prints; empty where it failed."""
    said: str
    """What it wrote to stderr."""


@dataclass(frozen=True)
class Moment:
    """Where a run is."""

    attempt: int
    step: int


class Command:
    """`ddpm train SPEC`, started again and again on a store of its own."""

    def __init__(self, spec: Path, store: Path, environment: dict[str, str] | None = None) -> None:
        self.spec, self.store, self._environment = spec, store, environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._run: Run | None = None
        self._family: set[psutil.Process] = set()
        self._watching: threading.Thread | None = None
        self._log = store.with_name(f"{store.name}.log")
        self._told = 0

    # --- the process ---

    def start(self, *options: str) -> None:
        """Start the command, as the same one that was ended before."""
        assert not self.is_running()
        words = [sys.executable, "-m", "jobs", "train", str(self.spec), "--storage", str(self.store), "--json"]
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
        return self.store.with_name(f"{self.store.name}.json")

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
        """Wait for its end, which must be that of the run."""
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

    # --- its run ---

    def begun(self) -> bool:
        """Whether its store has a run."""
        return bool(Place.of(self.store / "runs").list())

    @property
    def run(self) -> Run:
        """The one run of its store."""
        if self._run is None:
            (name,) = wait_for(lambda: Place.of(self.store / "runs").list(), "the run", self)
            self._run = Run(Place.of(self.store / "runs" / name))
        return self._run

    def moment(self) -> Moment:
        """The newest attempt that has told of a step, and the last step that it told of."""
        live = self.run.live()
        return Moment(0, 0) if live is None else Moment(live["attempt"], live["images"] // BATCH)

    def kept(self) -> int:
        """The last step with a checkpoint; 0 before the first."""
        return max(self.run.checkpoints.steps(), default=0)

    def lost(self, attempt: int) -> int:
        """Steps that this attempt is known to have made since the last checkpoint."""
        moment = self.moment()
        return max(0, moment.step - self.kept()) if moment.attempt == attempt else 0

    def reach(self, step: int, after_attempt: int = 0) -> Moment:
        """Wait until a later attempt has made a step at or after this one, and one that no checkpoint holds."""

        def there() -> Moment | None:
            moment = self.moment()
            if moment.attempt > after_attempt and moment.step >= step and moment.step > self.kept():
                return moment
            return None

        return wait_for(there, f"step {step} of an attempt after {after_attempt}", self)

    def reach_write(self) -> Path:
        """Wait until a checkpoint is being written that is not yet at the call; its folder until it is whole."""
        folder = self.run.checkpoints.place.path
        known = set(_folders(folder).values())
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            for name, number in _folders(folder).items():
                # One that is being removed is the folder that it was before, under another name.
                if number not in known and name.startswith(TEMPORARY) and not (folder / name / MANIFEST).exists():
                    return folder / name
                if not name.startswith(TEMPORARY):
                    known.add(number)
            assert time.monotonic() < end, "no checkpoint was written"
            assert self.process.poll() is None, self.said()
            time.sleep(_WRITE_LOOK_SECONDS)

    def reach_attempt(self, after: int) -> int:
        """Wait until a later attempt has found the checkpoint that it goes on from; its number."""

        def there() -> int | None:
            newest = self.run.newest_attempt()
            return newest if newest > after else None

        return wait_for(there, f"an attempt after {after}", self)

    def half_written(self) -> list[str]:
        """Names of what lies half-written, or half-removed, among the checkpoints."""
        try:
            return [name for name in os.listdir(self.run.checkpoints.place.path) if name.startswith(TEMPORARY)]
        except FileNotFoundError:  # before the first
            return []

    def worker(self, attempt: int, rank: int) -> psutil.Process:
        """The process of a rank."""
        told = wait_for(lambda: self.run.worker(attempt, rank), f"rank {rank} of attempt {attempt}", self)
        process = psutil.Process(told["pid"])
        assert process.cmdline()[0].startswith("ray::"), f"{process} is not the worker that was"
        return process

    def workers(self, attempt: int) -> list[psutil.Process]:
        """The processes of all ranks that have told of themselves and are alive."""
        told = itertools.takewhile(bool, (self.run.worker(attempt, rank) for rank in itertools.count()))
        return [psutil.Process(one["pid"]) for one in told if psutil.pid_exists(one["pid"])]

    def controller(self) -> psutil.Process:
        """The process of Ray Train's controller."""

        def found() -> psutil.Process | None:
            for process in self.family():
                try:
                    if process.is_running() and process.name() != "" and "TrainController" in process.cmdline()[0]:
                        return process
                except (psutil.NoSuchProcess, IndexError):
                    continue
            return None

        return wait_for(found, "the controller", self)


def _folders(folder: Path) -> dict[str, int]:
    """What is in a folder, by name, with what stays the same when it is renamed."""
    try:
        return {entry.name: entry.inode() for entry in os.scandir(folder)}
    except FileNotFoundError:  # before the first
        return {}


@contextmanager
def command(spec: Path, store: Path, environment: dict[str, str] | None = None) -> Iterator[Command]:
    """A command, however often it is killed, that leaves nothing behind."""
    given = Command(spec, store, environment)
    try:
        yield given
        if not given.is_running():
            assert_gone(given.family())
    finally:
        given.put_away()


def wait_for(look: Callable[[], T | None], what: str, of: Command, seconds: float = PATIENCE_SECONDS) -> T:
    """What `look` finds at last, while the command lives."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert of.process.poll() is None, f"ended with {of.process.poll()} before {what}: {of.said()}"
        assert time.monotonic() < end, f"no sign of {what} in {seconds:g} s: {of.said()}"
        time.sleep(_LOOK_SECONDS)
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
