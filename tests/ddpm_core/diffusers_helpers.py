"""diffusers' schedulers on our schedules, for the tests that hold ours against them."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from ddpm_core import NoiseSchedule, noise

LINEAR = NoiseSchedule.linear()
SCHEDULES = {
    "linear": LINEAR,
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "quadratic": NoiseSchedule.quadratic(),
    "zero terminal": LINEAR.rescale_zero_terminal(),
}
TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned_range": "learned_range"}
SHAPE = (3, 8, 8)
SEEDS = [5, 6, 2**60]
STEPS = 20
Scheduler = DDPMScheduler | DDIMScheduler | DPMSolverMultistepScheduler


def theirs(kind: type[Scheduler], schedule: NoiseSchedule, exact: bool = False, **config: Any) -> Any:
    """A scheduler of diffusers on our schedule; `exact` puts float64 into its table."""
    scheduler = kind(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.beta.tolist(),
        **({"timestep_spacing": "trailing"} | config),
    )
    if exact:
        scheduler.alphas_cumprod = schedule.alpha_bar
        scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def assert_agree(got: Tensor, expected: Tensor, within: float) -> None:
    """Within a share of the largest value."""
    error = (got.double() - expected.double()).abs().max().item() / expected.abs().max().item()
    assert error < within, f"off by {error:.2g} of the largest value"


def keyed(counter: int) -> Tensor:
    """The noise of our samplers: counter 0 is x_T, i + 1 that of step i."""
    return noise.normal([noise.key(seed, "sample") for seed in SEEDS], SHAPE, counter)


def feed(monkeypatch: pytest.MonkeyPatch, draw: Tensor) -> None:
    """DDPMScheduler draws its noise itself: let it draw ours."""
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, dtype, **_: draw.to(dtype))
