"""Watches a run while its group trains: tells how far it is, and has scores taken.

`fit()` runs beside the main thread, because Ray's own handler of SIGINT would abort the group, and because the main
thread reads the run's folder meanwhile. What the tracker may have is sent by a third (`pipelines.tracking.shipper`).
"""

import contextlib
import threading
import time
from collections.abc import Callable

from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.errors import Failed
from pipelines.files import StorageError
from pipelines.progress import Progress, counted
from pipelines.spec import Spec
from pipelines.train.beside import ScoresBeside
from pipelines.train.end import Why, plateau_end
from pipelines.train.group import explained, fit_through_deaths
from pipelines.train.run import Run

_WATCH_SECONDS = 0.5
_CLUSTER_SECONDS = 1.0
_SCORES_SECONDS = 5.0
"""Between looks at the scores in a store where each is a request."""
_STOP_SECONDS = 12.0
_PATIENCE_SECONDS = 900.0
"""Without a word of the workers, a started group is given up: longer than any time-out within it, and than any step."""


class Watch:
    """Of one drive of a run, whose lock is the caller's."""

    def __init__(
        self,
        spec: Spec,
        dataset: Dataset,
        run: Run,
        cluster: Cluster,
        progress: Progress,
        check_held: Callable[[], None],
    ) -> None:
        """`check_held` is what the lock gives."""
        self._spec, self._dataset, self._run = spec, dataset, run
        self._cluster, self._progress = cluster, progress
        self._beside = ScoresBeside.where_there_is_room(spec, dataset, run, cluster, progress)
        self._check_held = check_held
        self._storage_is_away = False
        self._over = threading.Event()  # not the thread's word: of one whose `join` was interrupted it says it ended
        self._left = threading.Event()
        self._why: Why | None = None
        self._failure: BaseException | None = None
        self._trouble: str | None = None
        self._workers: tuple[int, int] | None = None
        self._heard: tuple[float, object] = (time.monotonic(), None)

    def run(self) -> Why | None:
        """Train to the end; what ended the run before `train.images`, if anything did."""
        self._run.forget_live()
        self._run.forget_asked()
        self._run.forget_failure()
        attempt = self._run.newest_attempt()
        threading.Thread(target=self._fit, name="ray-train", daemon=True).start()
        try:
            self._watch()
            if self._beside is not None and self._failure is None:
                self._beside.finish()
        except KeyboardInterrupt:
            self._leave(attempt, "stopping after this step, with a checkpoint; interrupt again to leave at once")
            raise
        except Failed:
            self._leave(attempt, "the workers stop after this step, with a checkpoint")
            raise
        finally:
            self._left.set()
            if self._beside is not None:
                self._beside.cancel()
        if self._failure is not None:
            raise explained(self._failure, self._spec)
        return self._why

    def _leave(self, attempt: int, told: str) -> None:
        """Stop the workers, if any has begun since that attempt: else there is nothing to keep."""
        with contextlib.suppress(StorageError):
            if self._run.newest_attempt() > attempt and not self._over.is_set():
                self._progress.say(told)
                self._stop()

    def _fit(self) -> None:
        ranks_score = self._beside is None
        try:
            self._why = fit_through_deaths(
                self._spec,
                self._dataset,
                self._run,
                self._progress.say,
                self._left.is_set,
                scores=ranks_score,
                alone=self._cluster.is_own,
            )
        except BaseException as error:  # handed to the main thread
            self._failure = error
        finally:
            self._over.set()

    def _watch(self) -> None:
        looked = scored = time.monotonic()
        pause = 0.0 if self._run.place.is_local else _SCORES_SECONDS
        leaving, cpus = set(self._cluster.draining()), self._cluster.cpus()
        while not self._over.wait(_WATCH_SECONDS):
            self._check_held()
            self._patiently(self._show)
            now = time.monotonic()
            if now - looked > _CLUSTER_SECONDS:
                leaving, cpus = self._look_at_cluster(leaving, cpus)
                looked = time.monotonic()
            if self._beside is not None and now - scored >= pause:
                self._patiently(self._look_at_scores)
                scored = time.monotonic()
            self._check_alive()

    def _look_at_scores(self) -> None:
        assert self._beside is not None
        # Where the storage was away, what the last look found may not have been followed up.
        if self._beside.look() or self._storage_is_away:
            end = plateau_end(self._run, self._spec.train)
            if end is not None and not self._over.is_set():
                self._stop()

    def _patiently(self, look: Callable[[], None]) -> None:
        """Do something that reads the run's folder, unless its storage is away: said once, and done the next time."""
        try:
            look()
        except StorageError as error:
            if not self._storage_is_away:
                self._progress.say(f"warning: {error}; training goes on")
            self._storage_is_away = True
        else:
            self._storage_is_away = False

    def _look_at_cluster(self, leaving: set[str], cpus: int) -> tuple[set[str], int]:
        """Have a checkpoint written before the group changes, which Ray does without a word to it."""
        draining, now = self._cluster.draining(), self._cluster.cpus()
        if more := draining - leaving:
            self._progress.say(f"{counted(len(more), 'host')} will leave the cluster: a checkpoint is written now")
            self._run.ask("checkpoint")
        elif now > cpus and self._spec.train.least_workers < self._spec.train.most_workers:
            self._run.ask("checkpoint")
        return leaving | more, now

    def _stop(self) -> None:
        """Have the workers stop after the step in hand, with a checkpoint; for so long they are waited for."""
        end = time.monotonic() + _STOP_SECONDS
        self._run.ask("stop")
        while not self._over.wait(0.5) and time.monotonic() < end:
            self._run.ask("stop")  # again: a checkpoint may have been asked for, and the answer to that deletes both

    def _show(self) -> None:
        """How far the run is, by how many workers, and what trouble it has with its storage, each told once."""
        if (live := self._run.live()) is None:
            return
        train = self._spec.train
        total = train.total_steps * train.global_batch
        figures = {name: live[name] for name in ("loss", "skipped") if live[name]}  # no loss where it was not finite
        self._progress.advance(live["images"], total, "images", rate=live["images_per_second"], **figures)
        if live["trouble"] not in (None, self._trouble):
            self._progress.say(f"warning: {live['trouble']}; training goes on, and tries again at the next checkpoint")
        self._trouble = live["trouble"]
        workers = (live["workers"], live["idle"])
        if workers != self._workers and (workers[1] or train.least_workers < train.most_workers):
            idle = f"; {workers[1]} more would not divide {train.slots} slots and wait" if workers[1] else ""
            self._progress.say(f"{counted(workers[0], 'worker')} train{'s' if workers[0] == 1 else ''}{idle}")
        self._workers = workers
        if live != self._heard[1]:
            self._heard = (time.monotonic(), live)

    def _check_alive(self) -> None:
        """Failed where a group that has trained gives no sign of life: waiting longer would be waiting for ever."""
        if self._heard[1] is None:  # not begun: Ray's own time-outs hold
            self._heard = (time.monotonic(), None)
        if time.monotonic() - self._heard[0] > _PATIENCE_SECONDS:
            raise Failed(
                f"run {self._run.name}: no step for {_PATIENCE_SECONDS / 60:g} minutes, nor an error of its workers: "
                "one of them hangs; the same command goes on from the last checkpoint"
            )
