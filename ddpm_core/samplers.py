"""Samplers: from noise to images, each image from a seed of its own.

One loop; a sampler is a small function that says where one step goes. Image i is a function of (weights, settings,
seed i, label i): its noise is keyed by its seed alone, whatever else is in the batch. (Its bits may depend on the
batch's size, with which the network's kernels can change.)
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core import noise
from ddpm_core.checks import NotFiniteError, check_finite
from ddpm_core.diffusion import GaussianDiffusion, Network, evaluating
from ddpm_core.guidance import Conditioned
from ddpm_core.schedule import NoiseSchedule, check_spacing
from ddpm_core.unet import UNet

# callback(step_index, t, x_t, x0_prediction): step_index counts from 0, t is the original timestep in 1..T, x_t
# the images before the step, x0_prediction what the step took for x0 (clipped, if clipping is on).
Callback = Callable[[int, int, Tensor, Tensor], None]


class Step(NamedTuple):
    """One step from t to t - 1 of a (respaced) schedule, as numbers."""

    beta: float
    alpha_bar: float
    alpha_bar_prev: float
    log_snr: float
    log_snr_prev: float
    """That of t - 1: infinite at the last step."""
    posterior_variance: float
    posterior_x0: float
    """What x0 is multiplied by in the posterior's mean."""
    posterior_x_t: float

    def variance(self, process: GaussianDiffusion) -> float:
        """Of the reverse step, where it is fixed."""
        return self.posterior_variance if process.variance == "small" else self.beta

    @property
    def is_last(self) -> bool:
        """t = 1: what it leads to is the image."""
        return self.alpha_bar_prev == 1


# A move takes (step, x_t, x0, the reverse step's variance) to the mean of x_{t-1} and its standard deviation.
Move = Callable[[Step, Tensor, Tensor, Tensor | float], tuple[Tensor, Tensor | float]]


def ancestral(step: Step, x_t: Tensor, x0: Tensor, variance: Tensor | float) -> tuple[Tensor, Tensor | float]:
    """A draw from p(x_{t-1} | x_t) (DDPM, algorithm 2)."""
    return step.posterior_x0 * x0 + step.posterior_x_t * x_t, 0.0 if step.is_last else variance**0.5


def ddim(eta: float) -> Move:
    """Song et al. 2021, "Denoising diffusion implicit models", eq. 12.

    eta = 0 is deterministic; eta = 1 is ancestral sampling with the small variance. eps is the one that goes with
    x0, so that a clipped x0 and its eps still add up to x_t.
    """

    def move(step: Step, x_t: Tensor, x0: Tensor, variance: Tensor | float) -> tuple[Tensor, Tensor | float]:
        eps = (x_t - math.sqrt(step.alpha_bar) * x0) / math.sqrt(1 - step.alpha_bar)
        sigma = eta * math.sqrt(step.posterior_variance)
        towards_x_t = math.sqrt(max(0.0, 1 - step.alpha_bar_prev - sigma**2))
        return math.sqrt(step.alpha_bar_prev) * x0 + towards_x_t * eps, sigma

    return move


def dpmpp_2m() -> Move:
    """DPM-Solver++(2M), deterministic (Lu et al. 2022, "DPM-Solver++", algorithm 2).

    With lambda half the log-SNR and h its growth in a step, x0 is extrapolated from this step's and the last one's.
    The first step has no last one, and the last step has h infinite: both are of first order, which is DDIM's.
    """
    previous: list[tuple[Tensor, float]] = []

    def move(step: Step, x_t: Tensor, x0: Tensor, variance: Tensor | float) -> tuple[Tensor, Tensor | float]:
        h = (step.log_snr_prev - step.log_snr) / 2
        extrapolated = x0
        if previous and not step.is_last:
            x0_before, h_before = previous[0]
            half_inverse_r = h / (2 * h_before)
            extrapolated = (1 + half_inverse_r) * x0 - half_inverse_r * x0_before
        previous[:] = [(x0, h)]
        noise_ratio = math.sqrt((1 - step.alpha_bar_prev) / (1 - step.alpha_bar))
        return noise_ratio * x_t - math.sqrt(step.alpha_bar_prev) * math.expm1(-h) * extrapolated, 0.0

    return move


def _move(sampler: str, eta: float) -> Move:
    """A sampler's move, for one trajectory."""
    return {"ancestral": lambda: ancestral, "ddim": lambda: ddim(eta), "dpmpp_2m": dpmpp_2m}[sampler]()


SAMPLERS = ("ancestral", "ddim", "dpmpp_2m")


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
    dynamic_threshold: float | None = None,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one image a seed: float32 [N, C, H, W], in [-1, 1] where `clip_x0` is on.

    model(x_t, timestep) is called once a step, in eval mode and inference mode; its mode is put back. shape is
    (C, H, W). seeds are integers. steps is the number of network calls, None for every timestep of the schedule;
    `spacing` chooses them (`NoiseSchedule.respace`). eta in 0..1 belongs to "ddim"; the process's variance belongs to
    "ancestral" ("dpmpp_2m" and "ddim" do not use it). dynamic_threshold, a quantile such as 0.995, clips each image's
    x0 to that quantile of its absolute values instead of to 1, and scales it back to 1 (Saharia et al. 2022,
    "Imagen", section 2.3). labels, one class an image, and guidance are for a class-conditional `UNet`, see
    `ddpm_core.guidance`. device defaults to the model's.

    ValueError for an unknown sampler or spacing, no seeds, steps outside 1..T, eta outside 0..1, or above 0 with
    another sampler than "ddim", a dynamic threshold outside (0, 1] or without clipping, labels that do not fit, and, as
    a NotFiniteError, for images that come out as NaN.
    """
    _check_options(sampler, eta, spacing, clip_x0, dynamic_threshold, len(seeds))
    if steps is not None:
        process = process.respace(steps, spacing)
    if device is None:
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = "cpu" if first is None else first.device

    network = _network(process, model, shape[0], len(seeds), labels, guidance, device)
    move = _move(sampler, eta)
    keys = [noise.key(seed, "sample") for seed in seeds]
    original, steps_down = process.schedule.original_timesteps.tolist(), _steps(process.schedule)
    draws = noise.Draws(keys, shape, process.timesteps + 1, device)
    try:
        with evaluating(model):
            x = draws[0]
            for index, (t, step) in enumerate(steps_down):
                t_tensor = torch.full((len(keys),), t, device=device)
                output = process.call(network, x, t_tensor)
                x0 = process.predict_x0(x, t_tensor, output)
                if clip_x0:
                    x0 = x0.clamp(-1, 1) if dynamic_threshold is None else _thresholded(x0, dynamic_threshold)
                if callback is not None:
                    callback(index, original[t - 1], x, x0)
                learned = process.variance == "learned_range" and sampler == "ancestral"
                variance = process.predict_variance(x, t_tensor, output) if learned else step.variance(process)
                x, sigma = move(step, x, x0, variance)
                if isinstance(sigma, Tensor) or sigma > 0:
                    x = x + sigma * draws[index + 1]
        check_finite(x)
    except NotFiniteError:
        raise NotFiniteError(
            "the images hold NaN or infinities: the network, or its sampler without clipping, diverged"
        ) from None
    return x.clone()  # a copy made outside inference mode can be used anywhere


def _check_options(
    sampler: str, eta: float, spacing: str, clip_x0: bool, dynamic_threshold: float | None, images: int
) -> None:
    check_spacing(spacing)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0..1, not {eta}")
    if eta and sampler != "ddim":
        raise ValueError(f"eta belongs to the ddim sampler, not to {sampler!r}")
    if dynamic_threshold is not None and not (clip_x0 and 0 < dynamic_threshold <= 1):
        raise ValueError(f"dynamic_threshold is a quantile in (0, 1] and needs clip_x0, not {dynamic_threshold}")
    if images == 0:
        raise ValueError("seeds is empty: give one seed an image")


def _network(
    process: GaussianDiffusion,
    model: Network,
    image_channels: int,
    images: int,
    labels: Sequence[int] | None,
    guidance: float,
    device: torch.device | str,
) -> Network:
    """The model as a function of (x_t, timestep)."""
    if labels is None:
        if guidance != 1:
            raise ValueError("guidance steers towards a class: give labels")
        return model
    if not isinstance(model, UNet):
        raise ValueError("labels are for a UNet with classes")
    if len(labels) != images:
        raise ValueError(f"one label an image is needed: {len(labels)} for {images} images")
    steered = image_channels if process.variance == "learned_range" else None
    return Conditioned(model, torch.tensor(labels, device=device), guidance, steered)


def _thresholded(x0: Tensor, quantile: float) -> Tensor:
    limit = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-limit, limit) / limit


def _steps(schedule: NoiseSchedule) -> list[tuple[int, Step]]:
    """(t, step) for t = T..1."""
    log_snr = schedule.log_snr.tolist()
    columns = zip(
        schedule.beta.tolist(),
        schedule.alpha_bar.tolist(),
        schedule.alpha_bar_prev.tolist(),
        log_snr,
        [math.inf, *log_snr[:-1]],
        schedule.posterior_variance.tolist(),
        *(factor.tolist() for factor in schedule.posterior_factors),
        strict=True,
    )
    return [(t, Step(*column)) for t, column in enumerate(columns, start=1)][::-1]
