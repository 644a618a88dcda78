"""`ddpm train` as somebody else's process, whose run is watched from outside."""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipelines.store import MANIFEST, TEMPORARY, Place
from pipelines.train.run import Run
from tests.conftest import tiny_fields
from tests.faults.verb import PATIENCE_SECONDS, Verb, assert_gone, wait_for

_WRITE_LOOK_SECONDS = 0.0005

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
class Moment:
    """Where a run is."""

    attempt: int
    step: int


class Command(Verb):
    """`ddpm train SPEC`, started again and again on a store of its own."""

    def __init__(self, spec: Path, store: Path, environment: dict[str, str] | None = None) -> None:
        super().__init__(["train", str(spec), "--storage", str(store)], store, environment)
        self.spec, self.store = spec, store
        self._run: Run | None = None

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
