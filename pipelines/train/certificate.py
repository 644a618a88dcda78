"""The promise of exact resumption, tried: the first steps of a spec twice, once undisturbed, once with kills.

The disturbed run's workers are killed by SIGKILL at steps drawn at random, Ray Train starts the group again each time,
and between two kills it is stopped and gone on with by another number of workers. Then weights, average, optimizer and
the journal's exact rows are compared, bit for bit.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from socket import gethostname
from typing import Any

from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.errors import Failed, UserError
from pipelines.progress import Progress, counted
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.checkpoint import STATE
from pipelines.train.group import fit
from pipelines.train.run import Run, environment

_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 300.0
_INTERVALS = 4
"""Checkpoints of the whole, so that a kill costs steps."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    attempt: int
    workers: int
    rank: int
    at_step: int
    """The last step that was seen done; some more may have been."""
    lost: int
    """Of these, the steps since the last checkpoint, which were made again."""


@dataclass(frozen=True)
class Certificate:
    """What was compared, and what came of it."""

    name: str
    dataset_digest: str
    steps: int
    same: bool
    differs: list[str]
    """Files of the last checkpoint and `journal`, if their bits are not the same."""
    digests: dict[str, str]
    """sha256 of the files of the undisturbed run's last checkpoint."""
    kills: list[Kill]
    undisturbed_workers: int
    workers: list[int]
    """Numbers of workers, in the order in which they took the disturbed run on."""
    seed: int
    """Of the moments."""
    environment: dict[str, Any] = field(default_factory=dict)


def certify(
    spec: Spec, dataset: Dataset, place: Place, cluster: Cluster, progress: Progress, steps: int, kills: int
) -> Certificate:
    """Train both below `place`, which is emptied first. UserError where the spec is shorter, or the host too small."""
    if steps > spec.train.total_steps:
        raise UserError(f"--steps {steps}: the spec trains {spec.train.total_steps} steps; give fewer")
    place.remove()
    cluster.connect()
    undisturbed, disturbed = (_begun(spec, dataset, place / name) for name in ("undisturbed", "disturbed"))
    with undisturbed.driving():
        progress.start("undisturbed", f"{steps} steps")
        fit(_shortened(spec, steps, spec.train.most_workers), dataset, undisturbed, alone=cluster.is_own)
        progress.finish("undisturbed", f"{steps} steps")
    seed = random.SystemRandom().randrange(2**32)
    with disturbed.driving():
        progress.start("disturbed", f"{steps} steps, {counted(kills, 'kill')}")
        disturbance = _Disturbance(spec, dataset, disturbed, cluster, progress, steps, kills, random.Random(seed))
        disturbance.run()
        progress.finish("disturbed", f"{steps} steps, {sum(kill.lost for kill in disturbance.killed)} of them again")
    differs = compare(undisturbed, disturbed, steps)
    return Certificate(
        name=undisturbed.name,
        dataset_digest=dataset.digest,
        steps=steps,
        same=not differs,
        differs=differs,
        digests=undisturbed.checkpoints.digests(steps),
        kills=disturbance.killed,
        undisturbed_workers=spec.train.most_workers,
        workers=disturbance.took_turns,
        seed=seed,
        environment=environment(),
    )


def compare(one: Run, other: Run, step: int) -> list[str]:
    """What of two runs is not the same bits up to a step: files of its checkpoint, and `journal` for the exact rows."""
    digests = [run.checkpoints.digests(step) for run in (one, other)]
    names = sorted({*digests[0], *digests[1]} - {STATE})  # that file tells what it was computed on, which may differ
    differs = [name for name in names if digests[0].get(name) != digests[1].get(name)]
    rows = [[(row.step, row.exact) for row in run.journal.read(step)] for run in (one, other)]
    return differs if rows[0] == rows[1] else [*differs, "journal"]


class _Disturbance:
    """The run that is killed; its driver is this process."""

    def __init__(
        self,
        spec: Spec,
        dataset: Dataset,
        run: Run,
        cluster: Cluster,
        progress: Progress,
        steps: int,
        kills: int,
        moments: random.Random,
    ) -> None:
        self.spec, self.dataset, self.disturbed, self.progress = spec, dataset, run, progress
        self.steps, self.kills, self.moments = steps, kills, moments
        self.turns, self.alone = _numbers_of_workers(spec, cluster), cluster.is_own
        self.killed: list[Kill] = []
        self.took_turns: list[int] = []

    def run(self) -> None:
        for number in range(self.kills + 1):
            workers = self.turns[number % len(self.turns)]
            self.took_turns.append(workers)
            last = number == self.kills
            self._turn(workers, None if last else self._moment(number))

    def _moment(self, number: int) -> int:
        """A step of this kill's part of the run, so that all of them find something to kill."""
        first, last = (self.steps * part // (self.kills + 1) for part in (number, number + 1))
        return self.moments.randint(first + 1, max(first + 1, last - 1))

    def _turn(self, workers: int, kill_at: int | None) -> None:
        """Let so many workers train; kill one when the step is done, and stop them when they have caught up."""
        over, errors = threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                fit(_shortened(self.spec, self.steps, workers), self.dataset, self.disturbed, alone=self.alone)
            except BaseException as error:  # raised where the turn ends
                errors.append(error)
            finally:
                over.set()

        self.disturbed.forget_asked()
        self.disturbed.forget_failure()
        before = self.disturbed.newest_attempt()
        threading.Thread(target=work, name="ray-train", daemon=True).start()
        killed = kill_at is None
        for step in self._watched(over):
            if kill_at is None or step < kill_at:
                continue
            attempt = self.disturbed.newest_attempt()
            if not killed and attempt > before:
                killed = self._kill(attempt, workers, step)
                kill_at = step + 1  # done again by those who take its place, and one step more
            elif killed and attempt > before + 1:
                self.disturbed.ask("stop")
        if errors:
            raise errors[0]
        if not killed:
            raise Failed("verify-resume: the run was over before its worker could be killed; give more --steps")

    def _watched(self, over: threading.Event) -> Iterator[int]:
        """The last step that the run has told of, again and again until it ends."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while not over.wait(_LOOK_SECONDS):
            if time.monotonic() > end:
                raise Failed(f"verify-resume: the run has not ended after {_PATIENCE_SECONDS:g} s")
            live = self.disturbed.live()
            step = 0 if live is None else live["images"] // self.spec.train.global_batch
            self.progress.advance(step, self.steps, "steps")
            yield step

    def _kill(self, attempt: int, workers: int, step: int) -> bool:
        """Kill one worker of an attempt, if it is there; whether a step was lost, without which it is no trial."""
        rank = self.moments.randrange(workers)
        process = self.disturbed.worker(attempt, rank)
        if process is None or step <= self._kept():
            return False
        if process["host"] != gethostname():
            raise Failed(f"verify-resume: a worker is on {process['host']}, where it cannot be killed from here")
        try:
            os.kill(process["pid"], signal.SIGKILL)
        except ProcessLookupError:
            return False
        lost = step - self._kept()  # a checkpoint may have been on its way
        if lost > 0:
            self.killed.append(Kill(attempt, workers, rank, step, lost))
        return lost > 0

    def _kept(self) -> int:
        return max(self.disturbed.checkpoints.steps(), default=0)


def _numbers_of_workers(spec: Spec, cluster: Cluster) -> list[int]:
    """Other numbers than the spec's, then its own, and so on: all that share the slots out and fit the cluster."""
    cores = cluster.cpus() // spec.train.threads
    fit_in = [n for n in (1, 2, 4, 8) if spec.train.slots % n == 0 and (n <= cores or spec.train.oversubscribe)]
    return [n for n in fit_in if n != spec.train.most_workers] + [spec.train.most_workers]


def _begun(spec: Spec, dataset: Dataset, store: Place) -> Run:
    run = Run.of(spec, dataset.digest, store)
    run.describe(spec, dataset.digest)
    return run


def _shortened(spec: Spec, steps: int, workers: int) -> Spec:
    changes = {
        "images": steps * spec.train.global_batch,
        "workers": workers,
        "checkpoint_every": max(2, steps // _INTERVALS),
        "log_every": 1,
        "keep_best": False,
        **dict.fromkeys(("checkpoint_minutes", "budget_minutes", "plateau", "score")),
    }
    return spec.model_copy(update={"train": spec.train.model_copy(update=changes)})
