"""Drives a training run from wherever it is to its end, and says what there is to say of it."""

import contextlib
from collections.abc import Iterator, Mapping
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
from pipelines.sections import Train
from pipelines.spec import Spec
from pipelines.store import DamageError, Place
from pipelines.tracking import Tracker
from pipelines.train.checkpoint import EMA, MODEL
from pipelines.train.end import (
    End,
    Why,
    awaited_scores,
    kept_for_scores,
    known_end,
    last_step,
    lost_scores,
    plateau_end,
    record_end,
)
from pipelines.train.group import on_gpu, workers_needed
from pipelines.train.run import Run, changes, environment
from pipelines.train.watch import Watch


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
    why: Why | None = None
    """What ended it before `train.images`, if anything did."""


def train(
    spec: Spec, dataset: Dataset, store: Place, cluster: Cluster, tracker: Tracker, progress: Progress
) -> Trained:
    """Train to `spec.train.images`, from the last checkpoint if there is one. UserError for what the user can mend."""
    run = Run.of(spec, dataset.digest, store)
    if (done := trained(run, spec)) is not None:
        run.checkpoints.pin(done.step)
        _say_what_was_damaged(run, dataset, progress)
        with tracker.shipping(run, spec, dataset, progress, driven=False):
            return done
    further = [step for step in run.checkpoints.steps() if step > spec.train.total_steps]
    if further:
        raise UserError(
            f"train.images: run {run.name} is at {further[-1] * spec.train.global_batch:,} images already and keeps no "
            f"checkpoint at {spec.train.total_steps * spec.train.global_batch:,}; ask for more, or change the seed"
        )
    _check_not_past_its_end(run, spec)
    with _telling_how_to_go_on(run, progress):
        return _drive(run, spec, dataset, cluster, tracker, progress)


@contextlib.contextmanager
def _telling_how_to_go_on(run: Run, progress: Progress) -> Iterator[None]:
    """Say what an interrupt leaves, whenever it comes; by then all that was under way has ended."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(StorageError):  # an interrupt is one, wherever the storage is
            step = run.checkpoints.latest_step()
            on = "the same command goes on from there"
            progress.say(f"run {run.name} {f'keeps step {step:,}, {on}' if step else 'had no checkpoint yet'}")
        raise


def _drive(run: Run, spec: Spec, dataset: Dataset, cluster: Cluster, tracker: Tracker, progress: Progress) -> Trained:
    """Train a run that is not finished."""
    with run.driving() as check_held:
        _check_resources(spec, cluster)  # first: a run that cannot begin is none
        run.describe(spec, dataset.digest)
        # Workers look again; here, a damaged one is named where the user reads it.
        if (step := run.checkpoints.latest_step()) is not None:
            progress.say(f"run {run.name} goes on from step {step:,}")
            _say_what_changed(run.checkpoints.environment(step), "cuda" if on_gpu(spec) else "cpu", progress)
            _say_what_was_damaged(run, dataset, progress)
        with tracker.shipping(run, spec, dataset, progress):
            # By scores that were taken before, the end may have been reached already.
            watch = Watch(spec, dataset, run, cluster, progress, check_held)
            why = None if _is_at_its_plateau(run, spec) else watch.run()
            _record_end(run, spec, why, progress)
            if spec.train.keep_best and trained(run, spec) is not None:
                thin(run, spec.train)
    done = trained(run, spec)
    if done is None:
        raise RuntimeError(f"run {run.name} ended without its last checkpoint, see {run.place}")
    run.checkpoints.pin(done.step)
    _say_what_was_damaged(run, dataset, progress)
    return done


def thin(run: Run, train: Train) -> None:
    """Remove the best checkpoint so far of a run that is done, where its last score, which came later, was better."""
    last, also = last_step(run, train), kept_for_scores(run, train)
    run.checkpoints.thin(last, train.keep_checkpoints, train.keep_every, also)


def trained(run: Run, spec: Spec) -> Trained | None:
    """What a finished run made, or None while it is not finished."""
    step = last_step(run, spec.train)
    if not run.checkpoints.verifies(step) or awaited_scores(run, spec.train):
        return None
    digests = run.checkpoints.digests(step)
    return Trained(
        run=run.name,
        checkpoint=str(run.checkpoints.at(step)),
        step=step,
        attempts=run.newest_attempt(),
        model_sha256=digests[MODEL],
        ema_sha256=digests[EMA],
        why=None if (end := known_end(run, spec.train)) is None else end.why,
        damaged=len(run.damage()),
    )


def _check_not_past_its_end(run: Run, spec: Spec) -> None:
    """UserError where the run went past its end, or past a step whose score the end depends on, and keeps neither."""
    if spec.train.plateau is not None and (lost := lost_scores(run, spec.train)):
        raise UserError(
            f"train.plateau: it needs the score of run {run.name} at {lost[0] * spec.train.global_batch:,} images, "
            "where neither it nor a checkpoint is kept any more; train without it, or change the seed"
        )
    end, steps = plateau_end(run, spec.train), run.checkpoints.steps()
    if end is None or not steps or end.step not in range(1, steps[-1]) or run.checkpoints.verifies(end.step):
        return
    raise UserError(
        f"train.plateau: run {run.name} is at {steps[-1] * spec.train.global_batch:,} images already, by its scores it "
        f"ends at {end.step * spec.train.global_batch:,}, and it keeps no checkpoint there; ask for more patience, or "
        "change the seed"
    )


def _is_at_its_plateau(run: Run, spec: Spec) -> bool:
    end = plateau_end(run, spec.train)
    return end is not None and run.checkpoints.verifies(end.step)


def _record_end(run: Run, spec: Spec, why: Why | None, progress: Progress) -> None:
    """Keep what ended the run before `train.images`, if anything did."""
    end = End(run.last_step(), why) if why == "budget" else plateau_end(run, spec.train)
    if end is not None and end.step < spec.train.total_steps:
        record_end(run, spec.train, end)
        progress.say(f"run {run.name} {end.told(spec.train)}")


def _say_what_changed(then: Mapping[str, Any], device: str, progress: Progress) -> None:
    """One line where the run goes on in surroundings on which its bits may depend."""
    then = {"device": "cpu", **then}  # of a time when there was no other
    if changed := changes(then, {**environment(), "device": device}):
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
    workers, have = workers_needed(spec), cluster.cpus()
    cores = workers * spec.train.threads
    if cores > have and not spec.train.oversubscribe:
        raise UserError(
            f"train.workers: {counted(workers, 'worker')} of {counted(spec.train.threads, 'thread')} need "
            f"{counted(cores, 'CPU')}, the cluster has {have}: lower it, or set train.oversubscribe for a test"
        )
    for resource, each in {**({"GPU": 1.0} if on_gpu(spec) else {}), **spec.train.resources}.items():
        need, there = workers * each, cluster.resource(resource)
        if need > there:
            raise UserError(
                f"train.resources: {counted(workers, 'worker')} need {need:g} {resource}, "
                f"the cluster has {there:g}: lower one of them, or leave the resource out"
            )
