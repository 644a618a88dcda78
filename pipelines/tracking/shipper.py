"""Sends what a run owes MLflow while it is driven, from a thread of its own: neither a step nor the driver waits."""

import contextlib
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipelines.data.manifest import Dataset
from pipelines.progress import Progress
from pipelines.spec import Spec
from pipelines.train.run import Run

if TYPE_CHECKING:
    from pipelines.tracking.tracker import Tracker

_EVERY_SECONDS = 5.0
_FINISH_SECONDS = 30.0
"""So long the end of a run waits for MLflow, and may be interrupted."""
_LEAVE_SECONDS = 3.0
"""And so long one that is broken off."""


class Shipper:
    """A block in which a run is driven; how the block ends is how its MLflow run ends.

    The wait at the end is bounded. What MLflow has not got by then may still be sent while the process lives, and is
    sent by the next start of the run or by `ddpm reconcile` otherwise, which is said.
    """

    def __init__(
        self, tracker: "Tracker", run: Run, spec: Spec, dataset: Dataset, progress: Progress, driven: bool
    ) -> None:
        self._tracker, self._run, self._spec, self._dataset = tracker, run, spec, dataset
        self._progress, self._driven = progress, driven
        self._ending, self._over = threading.Event(), threading.Event()
        self._status, self._owes = "FINISHED", True

    def __enter__(self) -> Self:
        threading.Thread(target=self._work, name="tracking", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._ending.set()
        end = time.monotonic() + (_FINISH_SECONDS if kind is None else _LEAVE_SECONDS)
        while not self._over.wait(0.05) and time.monotonic() < end:
            pass
        if self._owes:  # or nobody knows, for the store is silent
            self._progress.say(
                f"MLflow has not got all of run {self._run.name} yet: its next start sends the rest, "
                f"or `{self._tracker.catching_up(self._run)}`"
            )

    def _work(self) -> None:
        """Only here is MLflow, or the store, waited for."""
        try:
            started = not self._driven
            while not self._ending.is_set():
                started = started or self._tracker.start(self._run, self._spec, self._dataset)
                if started:
                    self._tracker.ship(self._run, self._spec, self._dataset)
                self._ending.wait(_EVERY_SECONDS)
            status = self._end()
            self._tracker.ship(self._run, self._spec, self._dataset, status)
            with contextlib.suppress(Exception):  # what cannot be read may be owed
                self._owes = self._tracker.owes(self._run, self._spec, self._dataset, status)
        finally:
            self._over.set()

    def _end(self) -> str | None:
        """How the MLflow run ends; not at all where another process drives the run on, a longer one."""
        if self._driven:
            return self._status
        with contextlib.suppress(Exception):  # where that cannot be learnt, nothing is ended
            return None if self._run.is_driven() else self._status
        return None
