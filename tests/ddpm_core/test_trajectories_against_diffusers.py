"""Whole trajectories against diffusers' schedulers, which are given our betas, noise and networks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, sample
from tests.ddpm_core.diffusers_helpers import (
    SCHEDULES,
    SEEDS,
    SHAPE,
    STEPS,
    TYPES,
    VARIANCES,
    Scheduler,
    assert_agree,
    feed,
    keyed,
    theirs,
)

Step = Callable[[Scheduler, Tensor, int, Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def network() -> UNet:
    return trained(UNetConfig(image_channels=3, channels=(8,), groups=4))


@pytest.fixture(scope="module")
def wide_network() -> UNet:
    return trained(UNetConfig(image_channels=3, channels=(8,), groups=4, learned_variance=True))


def trained(config: UNetConfig) -> UNet:
    model = UNet(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@torch.inference_mode()
def their_trajectory(scheduler: Any, model: UNet, step: Step) -> list[Tensor]:
    x = keyed(0)
    trajectory = [x]
    for index, t in enumerate(scheduler.timesteps.tolist()):
        output = model(x, torch.full((len(SEEDS),), t))
        x = step(scheduler, output, t, x, keyed(index + 1))
        trajectory.append(x)
    return trajectory


def our_trajectory(process: GaussianDiffusion, model: UNet, **settings: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    last = sample(process, model, SHAPE, SEEDS, callback=lambda index, t, x_t, x0: seen.append(x_t), **settings)
    return [*seen, last]


def assert_same_trajectory(ours: list[Tensor], other: list[Tensor], within: float = 1e-4) -> None:
    assert len(ours) == len(other)
    for x, y in zip(ours, other, strict=True):
        assert_agree(x, y, within)
    assert ours[-1].std() > 0.1  # something was drawn


# How x0 is confined: ours, and what diffusers calls it.
CONFINED = {
    "free": ({"clip_x0": False}, {"clip_sample": False}),
    "clipped": ({}, {"clip_sample": True}),
    "thresholded": (
        {"dynamic_threshold": 0.9},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e9},
    ),
}


@pytest.mark.parametrize("confined", CONFINED)
@pytest.mark.parametrize(
    ("predict", "variance", "name"),
    [
        ("eps", "small", "linear"),
        ("eps", "large", "quadratic"),
        ("x0", "small", "sigmoid"),
        ("v", "large", "cosine"),
        ("v", "small", "zero terminal"),
        ("v", "learned_range", "linear"),
        ("x0", "learned_range", "cosine"),
    ],
)
def test_ancestral_trajectories(
    monkeypatch: pytest.MonkeyPatch,
    network: UNet,
    wide_network: UNet,
    predict: str,
    variance: str,
    name: str,
    confined: str,
) -> None:
    process = GaussianDiffusion(SCHEDULES[name], predict, variance)
    model = wide_network if variance == "learned_range" else network
    ours, config = CONFINED[confined]
    scheduler = theirs(
        DDPMScheduler,
        SCHEDULES[name],
        variance_type=VARIANCES[variance],
        prediction_type=TYPES[predict],
        **config,
    )
    chosen = process.respace(STEPS).schedule.original_timesteps.flip(0) - 1
    scheduler.set_timesteps(timesteps=chosen.tolist())

    def step(scheduler: Any, output: Tensor, t: int, x: Tensor, draw: Tensor) -> Tensor:
        # The last step adds no noise (DDPM, algorithm 2). Theirs does if it is not from the first timestep.
        feed(monkeypatch, torch.zeros_like(draw) if t == chosen[-1] else draw)
        return scheduler.step(output, t, x).prev_sample

    other = their_trajectory(scheduler, model, step)
    assert_same_trajectory(our_trajectory(process, model, steps=STEPS, **ours), other)


@pytest.mark.parametrize(("variance", "predict"), [("small", "eps"), ("large", "x0"), ("learned_range", "v")])
def test_ancestral_trajectories_of_every_timestep(
    monkeypatch: pytest.MonkeyPatch, network: UNet, wide_network: UNet, variance: str, predict: str
) -> None:
    """As diffusers' own DDPM pipeline samples: no timesteps chosen, noise at all of them but the first."""
    schedule = NoiseSchedule.cosine(150)
    model = wide_network if variance == "learned_range" else network
    config = {"variance_type": VARIANCES[variance], "prediction_type": TYPES[predict], "clip_sample": True}
    scheduler = theirs(DDPMScheduler, schedule, exact=True, **config)

    def step(scheduler: Any, output: Tensor, t: int, x: Tensor, draw: Tensor) -> Tensor:
        feed(monkeypatch, draw)
        return scheduler.step(output, t, x).prev_sample

    other = their_trajectory(scheduler, model, step)
    assert_same_trajectory(our_trajectory(GaussianDiffusion(schedule, predict, variance), model), other, 1e-5)


@pytest.mark.parametrize("confined", CONFINED)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("predict", "name"), [("eps", "linear"), ("v", "cosine"), ("v", "zero terminal")])
def test_ddim_trajectories(network: UNet, predict: str, name: str, eta: float, confined: str) -> None:
    process = GaussianDiffusion(SCHEDULES[name], predict)
    ours, config = CONFINED[confined]
    # From no signal at all with eta = 1 the direction towards x_t is 0: in float32 theirs takes the root of 6e-8.
    exact = name == "zero terminal"
    scheduler = theirs(DDIMScheduler, SCHEDULES[name], exact, prediction_type=TYPES[predict], **config)

    def step(scheduler: Any, output: Tensor, t: int, x: Tensor, draw: Tensor) -> Tensor:
        return scheduler.step(
            output, t, x, eta, use_clipped_model_output=True, variance_noise=draw if eta else None
        ).prev_sample

    scheduler.set_timesteps(STEPS)
    other = their_trajectory(scheduler, network, step)
    assert_same_trajectory(our_trajectory(process, network, sampler="ddim", steps=STEPS, eta=eta, **ours), other)


# It has no clipping of its own; thresholding with a largest value of 1 is just that.
DPM_CONFINED = {
    "free": ({"clip_x0": False}, {}),
    "clipped": ({}, {"thresholding": True, "sample_max_value": 1.0}),
    "thresholded": CONFINED["thresholded"],
}


@pytest.mark.parametrize("confined", DPM_CONFINED)
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize(
    ("predict", "name"), [("eps", "linear"), ("x0", "sigmoid"), ("v", "cosine"), ("v", "quadratic")]
)
def test_dpm_solver_trajectories(network: UNet, predict: str, name: str, spacing: str, confined: str) -> None:
    process = GaussianDiffusion(SCHEDULES[name], predict)
    ours, config = DPM_CONFINED[confined]
    scheduler = theirs(
        DPMSolverMultistepScheduler,
        SCHEDULES[name],
        prediction_type=TYPES[predict],
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
        **config,
    )
    for steps in (1, 2, STEPS):
        chosen = process.respace(steps, spacing).schedule.original_timesteps.flip(0) - 1
        scheduler.set_timesteps(timesteps=chosen.tolist())
        other = their_trajectory(
            scheduler, network, lambda scheduler, output, t, x, draw: scheduler.step(output, t, x).prev_sample
        )
        mine = our_trajectory(process, network, sampler="dpmpp_2m", steps=steps, spacing=spacing, **ours)
        assert_same_trajectory(mine, other)
