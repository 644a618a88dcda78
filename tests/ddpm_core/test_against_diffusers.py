"""Schedules and single steps against diffusers, which is given our betas, noise and networks.

diffusers keeps its tables in float32. So its DDPM steps are tried as they come, within 1e-4 of the largest value, and
with our table of alpha_bar in float64 put in their place, where the formulas must agree to nearly all digits.
(Its "sigmoid" schedule, a sigmoid of beta, is none of ours.)
"""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddim
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, sample
from tests.ddpm_core.diffusers_helpers import (
    LINEAR,
    SCHEDULES,
    SEEDS,
    SHAPE,
    STEPS,
    TYPES,
    VARIANCES,
    assert_agree,
    feed,
    keyed,
    theirs,
)

# Schedules.


@pytest.mark.parametrize(
    ("ours", "config"),
    [
        (NoiseSchedule.linear(), {"beta_schedule": "linear"}),
        (NoiseSchedule.linear(300, 0.001, 0.06), {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.06}),
        (NoiseSchedule.quadratic(), {"beta_schedule": "scaled_linear"}),
        (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (NoiseSchedule.cosine(50), {"beta_schedule": "squaredcos_cap_v2"}),
        (NoiseSchedule.linear().rescale_zero_terminal(), {"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
    ],
    ids=lambda value: str(value),
)
def test_schedules_by_name(ours: NoiseSchedule, config: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=ours.timesteps, **config)
    assert_agree(ours.beta, scheduler.betas, within=1e-5)
    assert_agree(ours.alpha_bar, scheduler.alphas_cumprod, within=1e-4)
    torch.testing.assert_close(ours.alpha_bar, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_given_the_same_betas(name: str) -> None:
    ours = SCHEDULES[name]
    scheduler = theirs(DDPMScheduler, ours)
    assert_agree(ours.alpha_bar, scheduler.alphas_cumprod, within=1e-5)
    torch.testing.assert_close(ours.alpha_bar, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "quadratic", "cosine"])
def test_rescaling_to_zero_terminal_signal_in_float64(name: str) -> None:
    betas = scheduling_ddim.rescale_zero_terminal_snr(SCHEDULES[name].beta)
    torch.testing.assert_close(SCHEDULES[name].rescale_zero_terminal().beta, betas, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [2, 7, 10, 50, 64, 250, 999, 1000])
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_respacing_chooses_the_same_timesteps(spacing: str, steps: int) -> None:
    """To within the rounding of halves: linspace comes on some, which both round to even, but we count from 1."""
    scheduler = theirs(DDPMScheduler, LINEAR, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    ours = (LINEAR.respace(steps, spacing).original_timesteps - 1).tolist()
    for i, (mine, other) in enumerate(zip(ours, scheduler.timesteps.flip(0).tolist(), strict=True)):
        half = spacing == "linspace" and (2 * i * 999) % (2 * (steps - 1)) == steps - 1
        assert abs(mine - other) <= half


@pytest.mark.parametrize("name", SCHEDULES)
def test_noising_and_velocity(name: str) -> None:
    process = GaussianDiffusion(SCHEDULES[name], "v")
    scheduler = theirs(DDPMScheduler, SCHEDULES[name], exact=True)
    t = torch.tensor([1, 2, 300, 999, 1000])
    x0, eps = torch.randn(2, 5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_agree(process.q_sample(x0, t, eps), scheduler.add_noise(x0, eps, t - 1), within=1e-12)
    assert_agree(process.target(x0, t, eps), scheduler.get_velocity(x0, eps, t - 1), within=1e-12)


# Single steps.


def random_output(variance: str, dtype: torch.dtype) -> Tensor:
    """Of a plausible size for a network: x0 within and beyond [-1, 1], and any choice of variance."""
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(len(SEEDS), *SHAPE, generator=generator, dtype=torch.float64)
    if variance == "learned_range":
        output = torch.cat((output, torch.randn(output.shape, generator=generator, dtype=torch.float64)), dim=1)
    return output.to(dtype)


COMBINATIONS = [
    (predict, variance, name)
    for predict in TYPES
    for variance in VARIANCES
    for name in ("linear", "cosine", "zero terminal")
    if not (predict == "eps" and name == "zero terminal")
]


@pytest.mark.parametrize(("predict", "variance", "name"), COMBINATIONS)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("dtype", "exact", "first", "within"),
    [
        (torch.float64, True, 2, 1e-11),
        (torch.float32, True, 2, 1e-6),
        # Below t = 20 diffusers' table, good to 6e-8, leaves 1 - alpha_bar too few digits for 1e-4.
        (torch.float32, False, 20, 1e-4),
    ],
    ids=["float64", "float32", "float32 tables"],
)
def test_ddpm_steps(
    monkeypatch: pytest.MonkeyPatch,
    predict: str,
    variance: str,
    name: str,
    clip: bool,
    dtype: torch.dtype,
    exact: bool,
    first: int,
    within: float,
) -> None:
    """`reverse` and the noise, mean + sqrt(variance) z; the step from t = 1 adds none."""
    schedule = SCHEDULES[name]
    process = GaussianDiffusion(schedule, predict, variance)
    config = {"variance_type": VARIANCES[variance], "prediction_type": TYPES[predict], "clip_sample": clip}
    scheduler = theirs(DDPMScheduler, schedule, exact, **config)
    x_t, draw = torch.randn(2, len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)
    output = random_output(variance, dtype)
    feed(monkeypatch, draw)
    for t in (1000, 999, 500, first + 1, first, 1):
        expected = scheduler.step(output, t - 1, x_t).prev_sample
        mean, model_variance, _ = process.reverse(x_t, torch.full((len(SEEDS),), t), output, clip_x0=clip)
        assert_agree(mean + model_variance.sqrt() * draw if t > 1 else mean, expected, within)


@pytest.mark.parametrize("predict", TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_steps(predict: str, eta: float, clip: bool, name: str) -> None:
    """Every step of a trajectory, each from where ours stands, in float64 tables."""
    process = GaussianDiffusion(SCHEDULES[name], predict)
    scheduler = theirs(DDIMScheduler, SCHEDULES[name], exact=True, prediction_type=TYPES[predict], clip_sample=clip)
    scheduler.set_timesteps(STEPS)
    output = random_output("small", torch.float32)
    seen: list[tuple[int, Tensor]] = []
    last = sample(
        process,
        lambda x, t: output,
        SHAPE,
        SEEDS,
        sampler="ddim",
        steps=STEPS,
        eta=eta,
        clip_x0=clip,
        callback=lambda index, t, x_t, x0: seen.append((t, x_t)),
    )
    assert [t - 1 for t, _ in seen] == scheduler.timesteps.tolist()
    for index, ((t, x_t), (_, after)) in enumerate(zip(seen, [*seen[1:], (0, last)], strict=True)):
        expected = scheduler.step(
            output.double(),
            t - 1,
            x_t.double(),
            eta,
            use_clipped_model_output=True,  # eps from the clipped x0, as the paper's step has it
            variance_noise=keyed(index + 1).double(),
        ).prev_sample
        assert_agree(after, expected, within=1e-5)
