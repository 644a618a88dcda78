"""Which average of a run's weights is its model: the one by half-life, or one whose length is chosen after training.

The latter is made of snapshots that lie on the clock of images seen (`train.ema_snapshot_every`) and of the step's own
checkpoint, whatever else the run's folder holds: it is the same one wherever the run was stopped.
"""

from collections.abc import Iterator, Mapping

import safetensors.torch
from torch import Tensor

from ddpm_core.ema import combine, post_hoc_coefficients, post_hoc_error
from pipelines.errors import UserError
from pipelines.evaluate.features import torch_threads
from pipelines.sections import Train
from pipelines.spec import Spec
from pipelines.train.checkpoint import EMA, MODEL
from pipelines.train.run import Run

MOST_ERROR = 0.1
"""Largest relative error of a reconstructed profile that is taken for the average that was asked for."""


def averaged(run: Run, step: int, spec: Spec, most_error: float = MOST_ERROR) -> tuple[bytes, str]:
    """The weights at a step as a safetensors file, and what they are in words.

    UserError where the snapshots make the length that `sample.ema_length` asks for with an error above `most_error`.
    """
    length = spec.sample.ema_length
    if length is None:
        weights = run.checkpoints.at(step).read_folder(EMA)[EMA]
        return weights, f"half-life {spec.train.ema_half_life} images"
    if length == "live":
        return run.checkpoints.at(step).read_folder(MODEL)[MODEL], "none, the live weights"
    target = run.checkpoints.profiles(step)
    if not target:
        raise UserError(f"sample.ema_length: run {run.name} keeps no averages of step {step}: see train.ema_profiles")
    coefficients, error = recipe(spec.train, step, length, most_error)
    with torch_threads(1):
        weights = safetensors.torch.save(combine(_snapshots(run, spec.train, step, target), coefficients))
    return weights, f"power function, sigma_rel {length:g}, its profile met to within {error:.1%}"


def recipe(train: Train, step: int, length: float, most_error: float = MOST_ERROR) -> tuple[Tensor, float]:
    """How much of each snapshot makes the average of that length at a step, and the relative error of its profile.

    Nothing needs to be trained to know either. UserError for an error above `most_error`.
    """
    steps = _steps(train, step)
    stored = [(float(s), width) for s in steps for width in _widths(train)]
    with torch_threads(1):  # the bits are the same in whatever process
        coefficients = post_hoc_coefficients(stored, step, length)
        error = post_hoc_error(stored, coefficients, step, length)
    if error > most_error:
        widths = ", ".join(f"{width:g}" for width in _widths(train))
        raise UserError(
            f"sample.ema_length: snapshots of {widths}, {len(steps)} of each, make {length:g} with an error of "
            f"{error:.0%}: choose a length nearer to them, or keep other widths (train.ema_profiles) or more "
            "(train.ema_snapshot_every)"
        )
    return coefficients, error


def _snapshots(
    run: Run, train: Train, step: int, target: Mapping[float, Mapping[str, Tensor]]
) -> Iterator[Mapping[str, Tensor]]:
    """The averages that the recipe is for, in its order."""
    kept = {*run.checkpoints.kept_snapshots(), step}
    if lost := [at for at in _steps(train, step) if at not in kept]:
        raise UserError(
            f"sample.ema_length: run {run.name} keeps no snapshot of step {lost[0]}, of which the average is made: it "
            "was lost, or an earlier version trained the run; leave sample.ema_length out, or train anew"
        )
    for at in _steps(train, step):
        profiles = target if at == step else run.checkpoints.snapshot(at)
        yield from (profiles[width] for width in _widths(train))


def _steps(train: Train, step: int) -> list[int]:
    return [at for at in train.snapshot_steps(step) if at < step] + [step]


def _widths(train: Train) -> list[float]:
    return sorted(set(train.ema_profiles))
