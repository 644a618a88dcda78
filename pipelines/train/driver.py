"""Drives a training run: Ray Train starts the workers and restarts the dead; the driver watches and reports.

`fit()` runs beside the main thread, because Ray's own handler of SIGINT would abort the group, and because the main
thread reads the run's folder meanwhile: how far it is, and which rows of the journal the tracker may have.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.cluster import Cluster
from pipelines.data.damage import Damage
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.files import StorageError
from pipelines.progress import Progress, counted
from pipelines.spec import Spec
from pipelines.store import DamageError, Place
from pipelines.tracking import Tracker
from pipelines.train.checkpoint import EMA, MODEL
from pipelines.train.group import explained, fit
from pipelines.train.run import Run, environment

_WATCH_SECONDS = 0.25
_SHIP_SECONDS = 5.0
_DRAIN_SECONDS = 1.0
_STOP_SECONDS = 12.0


@dataclass(frozen=True)
class Trained:
    """A run that reached its end."""

    run: str
    checkpoint: str
    step: int
    attempts: int
    model_sha256: str
    ema_sha256: str
    damaged: int
    """Training images that were damaged and had others read in their place; which, is in the run's `damage/`."""


def train(
    spec: Spec, dataset: Dataset, store: Place, cluster: Cluster, tracker: Tracker, progress: Progress
) -> Trained:
    """Train to `spec.train.images`, from the last checkpoint if there is one. UserError for what the user can mend."""
    run = Run.of(spec, dataset.digest, store)
    if (done := trained(run, spec)) is not None:
        run.checkpoints.pin(done.step)
        _say_what_was_damaged(run, dataset, progress)
        tracker.ship(run, spec, dataset, final=True)
        return done
    further = [step for step in run.checkpoints.steps() if step > spec.train.total_steps]
    if further:
        raise UserError(
            f"train.images: run {run.name} is at {further[-1] * spec.train.global_batch:,} images already and keeps no "
            f"checkpoint at {spec.train.total_steps * spec.train.global_batch:,}; ask for more, or change the seed"
        )
    with run.driving() as check_held:
        run.describe(spec, dataset.digest)
        # Workers look again; here, a damaged one is named where the user reads it.
        if (step := run.checkpoints.latest_step()) is not None:
            progress.say(f"run {run.name} goes on from step {step:,}")
            _say_what_changed(run.checkpoints.environment(step), progress)
            _say_what_was_damaged(run, dataset, progress)
        _check_resources(spec, cluster)
        tracker.start(run, spec, dataset)
        try:
            _fit_and_watch(spec, dataset, run, cluster, tracker, progress, check_held)
        except KeyboardInterrupt:
            step = run.checkpoints.latest_step()
            kept = f"keeps step {step:,}, the same command goes on from there" if step else "had no checkpoint yet"
            progress.say(f"run {run.name} {kept}")
            raise
        tracker.ship(run, spec, dataset, final=True)
    done = trained(run, spec)
    if done is None:
        raise RuntimeError(f"run {run.name} ended without its last checkpoint, see {run.place}")
    run.checkpoints.pin(done.step)
    _say_what_was_damaged(run, dataset, progress)
    return done


def trained(run: Run, spec: Spec) -> Trained | None:
    """What a finished run made, or None while it is not finished."""
    step = spec.train.total_steps
    if not run.checkpoints.verifies(step):
        return None
    digests = run.checkpoints.digests(step)
    return Trained(
        run=run.name,
        checkpoint=str(run.checkpoints.at(step)),
        step=step,
        attempts=run.newest_attempt(),
        model_sha256=digests[MODEL],
        ema_sha256=digests[EMA],
        damaged=len(run.damage()),
    )


def _say_what_changed(then: Mapping[str, Any], progress: Progress) -> None:
    """One line where the run goes on in surroundings on which its bits may depend."""
    now = environment()
    changed = [f"{name} {then.get(name)} is {now[name]} now" for name in now if then.get(name) != now[name]]
    if changed:
        progress.say(f"warning: the bits may differ from an unbroken run's: {', '.join(changed)}")


def _say_what_was_damaged(run: Run, dataset: Dataset, progress: Progress) -> None:
    """One line where other images were read in place of damaged ones; they may have been put right since."""
    if not (damaged := run.damage()):
        return
    first, folder = damaged[0], run.place / "damage"
    member = f" ({first.member})" if first.member else ""
    told = (
        f"warning: {counted(len(damaged), 'damaged training image')} of run {run.name} had others read in their place"
    )
    if whole := sum(_is_whole(dataset, damage) for damage in damaged):
        progress.say(
            f"{told}; {whole:,} of them are whole now, and the run's weights are not those that the images as they are "
            f"give: delete {run.place} to train anew"
        )
    else:
        progress.say(
            f"{told}, row {first.row}{member} of {first.shard} for one; all are in {folder}, "
            "and `ddpm data verify` names the damage"
        )


def _is_whole(dataset: Dataset, damage: Damage) -> bool:
    split = dataset.split("train")
    shard = split.table["name"].to_pylist().index(damage.shard)
    try:
        Reader(split, cache_bytes=0).read(np.array([shard]), np.array([damage.row]))
    except DamageError:
        return False
    return True


def _check_resources(spec: Spec, cluster: Cluster) -> None:
    cores, have = spec.train.workers * spec.train.threads, cluster.cpus()
    if cores > have and not spec.train.oversubscribe:
        raise UserError(
            f"train.workers: {counted(spec.train.workers, 'worker')} of {counted(spec.train.threads, 'thread')} need "
            f"{counted(cores, 'CPU')}, the cluster has {have}: lower it, or set train.oversubscribe for a test"
        )
    for resource, each in spec.train.resources.items():
        need, there = spec.train.workers * each, cluster.resource(resource)
        if need > there:
            raise UserError(
                f"train.resources: {counted(spec.train.workers, 'worker')} need {need:g} {resource}, "
                f"the cluster has {there:g}: lower one of them, or leave the resource out"
            )


def _fit_and_watch(
    spec: Spec,
    dataset: Dataset,
    run: Run,
    cluster: Cluster,
    tracker: Tracker,
    progress: Progress,
    check_held: Callable[[], None],
) -> None:
    failures: list[BaseException] = []
    over = threading.Event()  # not the thread's own word: of one whose `join` was interrupted Python 3.11 says it ended

    def work() -> None:
        try:
            fit(spec, dataset, run)
        except BaseException as error:  # handed to the main thread
            failures.append(error)
        finally:
            over.set()

    run.forget_live()
    run.forget_asked()
    attempt = run.newest_attempt()
    threading.Thread(target=work, name="ray-train", daemon=True).start()
    shipped = looked = time.monotonic()
    leaving, told, silent = set(cluster.draining()), None, False
    try:
        while not over.wait(_WATCH_SECONDS):
            check_held()
            told = _show(run, spec, progress, told)
            if time.monotonic() - shipped > _SHIP_SECONDS:
                silent = _ship(run, spec, dataset, tracker, progress, silent)
                shipped = time.monotonic()
            if time.monotonic() - looked > _DRAIN_SECONDS:
                if more := cluster.draining() - leaving:
                    progress.say(f"{counted(len(more), 'host')} will leave the cluster: a checkpoint is written now")
                    leaving |= more
                    run.ask("checkpoint")
                looked = time.monotonic()
    except KeyboardInterrupt:
        if run.newest_attempt() > attempt:  # else no worker has begun, and there is nothing to keep
            _stop(run, over, progress)
        raise
    if failures:
        raise explained(failures[0])


def _ship(run: Run, spec: Spec, dataset: Dataset, tracker: Tracker, progress: Progress, silent: bool) -> bool:
    """Send what is new to the tracker; whether the storage, from which it is read, does not answer. Said once."""
    try:
        tracker.ship(run, spec, dataset)
    except StorageError as error:
        if not silent:
            progress.say(f"warning: {error}; training goes on")
        return True
    return False


def _stop(run: Run, over: threading.Event, progress: Progress) -> None:
    """Have the workers stop after the step in hand, with a checkpoint; for so long they are waited for."""
    progress.say("stopping after this step, with a checkpoint; interrupt again to leave at once")
    end = time.monotonic() + _STOP_SECONDS
    run.ask("stop")
    while not over.wait(0.5) and time.monotonic() < end:
        run.ask("stop")  # again: a checkpoint may have been asked for, and the answer to that deletes both


def _show(run: Run, spec: Spec, progress: Progress, told: str | None) -> str | None:
    """How far the run is, and what trouble it has with its storage, unless that was told before; what is told now."""
    if (live := run.live()) is None:
        return told
    total = spec.train.total_steps * spec.train.global_batch
    figures = {name: live[name] for name in ("loss", "skipped") if live[name]}  # no loss where it was not finite
    progress.advance(live["images"], total, "images", rate=live["images_per_second"], **figures)
    trouble: str | None = live["trouble"]
    if trouble not in (None, told):
        progress.say(f"warning: {trouble}; training goes on, and tries again at the next checkpoint")
    return trouble
