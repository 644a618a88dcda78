"""Schedules, single steps and whole trajectories against diffusers, which is given our betas, noise and networks.

diffusers keeps its tables in float32. So its DDPM steps are tried as they come, within 1e-4 of the largest value, and
with our table of alpha_bar in float64 put in their place, where the formulas must agree to nearly all digits.
(Its "sigmoid" schedule, a sigmoid of beta, is none of ours.)
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, noise, sample

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
Step = Callable[[Scheduler, Tensor, int, Tensor, Tensor], Tensor]


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


def feed(monkeypatch: pytest.MonkeyPatch, draw: Tensor) -> None:
    """DDPMScheduler draws its noise itself: let it draw ours."""
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, dtype, **_: draw.to(dtype))


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


# Whole trajectories, of a network.


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


def keyed(counter: int) -> Tensor:
    """The noise of our samplers: counter 0 is x_T, i + 1 that of step i."""
    return noise.normal([noise.key(seed, "sample") for seed in SEEDS], SHAPE, counter)


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
