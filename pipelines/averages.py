"""Which average of a run's weights is its model: the one by half-life, or one whose length is chosen after training."""

import safetensors.torch

from ddpm_core.ema import combine, post_hoc_coefficients, post_hoc_error
from pipelines.errors import UserError
from pipelines.spec import Spec
from pipelines.train.checkpoint import EMA
from pipelines.train.run import Run

_MOST_ERROR = 0.1
"""Largest relative error of a reconstructed profile that is taken for the average that was asked for."""


def averaged(run: Run, step: int, spec: Spec) -> tuple[bytes, str]:
    """The weights at a step as a safetensors file, and what they are in words.

    UserError where the snapshots do not make the length that `sample.ema_length` asks for.
    """
    length = spec.sample.ema_length
    if length is None:
        weights = run.checkpoints.at(step).read_folder(EMA)[EMA]
        return weights, f"half-life {spec.train.ema_half_life} images"
    return _of_length(run, step, length), f"power function, sigma_rel {length}"


def _of_length(run: Run, step: int, length: float) -> bytes:
    steps = [s for s in run.checkpoints.snapshot_steps() if s <= step]
    if not steps or steps[-1] != step:
        raise UserError(f"sample.ema_length: run {run.name} keeps no averages of step {step}: see train.ema_profiles")
    snapshots = [(images, width) for images, profiles in map(run.checkpoints.snapshot, steps) for width in profiles]
    target = run.checkpoints.snapshot(step)[0]
    coefficients = post_hoc_coefficients(snapshots, target, length)
    error = post_hoc_error(snapshots, coefficients, target, length)
    if error > _MOST_ERROR:
        widths = ", ".join(sorted({f"{width:g}" for _, width in snapshots}))
        raise UserError(
            f"sample.ema_length: {len(steps)} snapshots of {widths} make {length:g} with an error of {error:.0%}: "
            "choose a length nearer to them, or keep more (train.ema_profiles, train.checkpoint_every)"
        )
    read = (profiles[width] for s in steps for profiles in [run.checkpoints.snapshot(s)[1]] for width in profiles)
    return safetensors.torch.save(combine(read, coefficients))
