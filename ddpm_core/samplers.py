"""Samplers: from noise to images, each image from a seed of its own.

One loop; a sampler is a small function that says where one step goes. Image i is a function of (weights, settings,
seed i): its noise is keyed by its seed alone, whatever else is in the batch. (Its bits may depend on the batch's
size, with which the network's kernels can change.)
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core import noise
from ddpm_core.diffusion import GaussianDiffusion, Network, evaluating

# callback(step_index, t, x_t, x0_prediction): step_index counts from 0, t is the original timestep in 1..T, x_t
# the images before the step, x0_prediction what the step took for x0 (clipped, if clipping is on).
Callback = Callable[[int, int, Tensor, Tensor], None]


class Step(NamedTuple):
    """One step from t to t - 1 of a (respaced) schedule, as numbers."""

    alpha: float
    beta: float
    alpha_bar: float
    alpha_bar_prev: float
    posterior_variance: float
    variance: str
    eta: float


def ancestral(step: Step, x_t: Tensor, x0: Tensor) -> tuple[Tensor, float]:
    """Mean and standard deviation of x_{t-1}: a draw from p(x_{t-1} | x_t) (DDPM, algorithm 2)."""
    x0_factor = math.sqrt(step.alpha_bar_prev) * step.beta / (1 - step.alpha_bar)
    x_t_factor = math.sqrt(step.alpha) * (1 - step.alpha_bar_prev) / (1 - step.alpha_bar)
    last = step.alpha_bar_prev == 1  # t = 1: the mean is the image
    variance = step.posterior_variance if step.variance == "small" else step.beta
    return x0_factor * x0 + x_t_factor * x_t, 0.0 if last else math.sqrt(variance)


def ddim(step: Step, x_t: Tensor, x0: Tensor) -> tuple[Tensor, float]:
    """Mean and standard deviation of x_{t-1} (Song et al. 2021, "Denoising diffusion implicit models", eq. 12).

    eta = 0 is deterministic; eta = 1 is ancestral sampling with the small variance. eps is the one that goes with
    x0, so that a clipped x0 and its eps still add up to x_t.
    """
    eps = (x_t - math.sqrt(step.alpha_bar) * x0) / math.sqrt(1 - step.alpha_bar)
    sigma = step.eta * math.sqrt(step.posterior_variance)
    towards_x_t = math.sqrt(max(0.0, 1 - step.alpha_bar_prev - sigma**2))
    return math.sqrt(step.alpha_bar_prev) * x0 + towards_x_t * eps, sigma


SAMPLERS: dict[str, Callable[[Step, Tensor, Tensor], tuple[Tensor, float]]] = {
    "ancestral": ancestral,
    "ddim": ddim,
}


def sample(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    seeds: Sequence[int],
    sampler: str = "ancestral",
    steps: int | None = None,
    eta: float = 0.0,
    spacing: str = "trailing",
    clip_x0: bool = True,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one image a seed: float32 [N, C, H, W], in [-1, 1] where `clip_x0` is on.

    model(x_t, timestep) is called once a step, in eval mode and inference mode; its mode is put back. shape is
    (C, H, W). seeds are integers. steps is the number of network calls, None for every timestep of the schedule;
    `spacing` chooses them (`NoiseSchedule.respace`). eta in 0..1 belongs to "ddim", which does not use the
    process's variance. device defaults to the model's.

    ValueError for an unknown sampler or spacing, no seeds, steps outside 1..T, eta outside 0..1, or above 0 with
    "ancestral".
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0..1, not {eta}")
    if eta and sampler != "ddim":
        raise ValueError(f"eta belongs to the ddim sampler, not to {sampler!r}")
    if len(seeds) == 0:
        raise ValueError("seeds is empty: give one seed an image")
    if steps is not None:
        process = process.respace(steps, spacing)
    if device is None:
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = "cpu" if first is None else first.device

    move = SAMPLERS[sampler]
    keys = [noise.key(seed, "sample") for seed in seeds]
    original = process.schedule.original_timesteps.tolist()
    with evaluating(model):
        x = noise.normal(keys, shape, counter=0, device=device)
        for index, (t, step) in enumerate(_steps(process, eta)):
            t_tensor = torch.full((len(keys),), t, device=device)
            x0 = process.predict_x0(x, t_tensor, process.call(model, x, t_tensor))
            if clip_x0:
                x0 = x0.clamp(-1, 1)
            if callback is not None:
                callback(index, original[t - 1], x, x0)
            x, sigma = move(step, x, x0)
            if sigma > 0:
                x = x + sigma * noise.normal(keys, shape, counter=index + 1, device=device)
    return x.clone()  # a copy made outside inference mode can be used anywhere


def _steps(process: GaussianDiffusion, eta: float) -> list[tuple[int, Step]]:
    """(t, step) for t = T..1."""
    schedule = process.schedule
    columns = zip(
        schedule.alpha.tolist(),
        schedule.beta.tolist(),
        schedule.alpha_bar.tolist(),
        schedule.alpha_bar_prev.tolist(),
        schedule.posterior_variance.tolist(),
        strict=True,
    )
    return [(t, Step(*column, process.variance, eta)) for t, column in enumerate(columns, start=1)][::-1]
