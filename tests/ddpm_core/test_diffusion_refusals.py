"""What the process refuses, and how it says so."""

import math
import re

import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule
from ddpm_core.diffusion import PREDICTIONS, VARIANCES

LINEAR = NoiseSchedule.linear()
COSINE = NoiseSchedule.cosine()
ZERO_TERMINAL = LINEAR.rescale_zero_terminal()


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", [LINEAR, ZERO_TERMINAL], ids=["linear", "zero terminal"])
def test_the_legal_combinations_are_these(predict: str, variance: str, schedule: NoiseSchedule) -> None:
    if predict == "mean" and variance == "learned_range":
        with pytest.raises(ValueError, match="small or large, not with learned_range"):
            GaussianDiffusion(schedule, predict, variance)
    elif predict == "eps" and schedule is ZERO_TERMINAL:
        with pytest.raises(ValueError, match="predict v or x0"):
            GaussianDiffusion(schedule, predict, variance)
    else:
        process = GaussianDiffusion(schedule, predict, variance)
        assert (process.predict, process.variance, process.timesteps) == (predict, variance, 1000)
        respaced = process.respace(10)
        assert (respaced.predict, respaced.variance, respaced.timesteps) == (predict, variance, 10)


@pytest.mark.parametrize("variance", VARIANCES)
def test_outputs_of_another_shape_are_refused(variance: str) -> None:
    process = GaussianDiffusion(LINEAR, variance=variance)
    x_t, t = images(3), torch.tensor([1, 2, 3])  # [3, 2, 3, 4]
    bad = [(3, 1, 3, 4), (3, 3, 3, 4), (2, 2, 3, 4), (3, 2, 4, 3), (3, 2, 3), (3, 6, 3, 4)]
    if variance != "learned_range":
        bad.append((3, 4, 3, 4))
    for shape in bad:
        said = re.escape(f"images [3, 2, 3, 4] and variance {variance} cannot be of shape {list(shape)}")
        for read in (process.predict_x0, process.predict_eps, process.predict_v, process.predict_mean):
            with pytest.raises(ValueError, match=said):
                read(x_t, t, torch.zeros(shape))
    if variance == "learned_range":
        with pytest.raises(ValueError, match="second half of the output's channels, which is missing"):
            process.predict_variance(x_t, t, x_t)


def test_the_loss_refuses_outputs_of_another_shape() -> None:
    process = GaussianDiffusion(LINEAR)
    with pytest.raises(ValueError, match="shape"):
        process.loss(lambda x, t: x[:, :1], images(2), torch.tensor([1, 2]), images(2, 1))


def test_images_without_channels_have_no_learned_variance() -> None:
    process = GaussianDiffusion(LINEAR, variance="learned_range")
    t = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="shape"):
        process.predict_x0(torch.zeros(3), t, torch.zeros(3, 2))


def test_bad_images_are_named() -> None:
    process = GaussianDiffusion(LINEAR)
    x, t = images(2), torch.tensor([1, 2])
    for call in (process.q_sample, process.q_step):
        for bad in (math.nan, math.inf):
            wrong = x.clone()
            wrong[1, 0, 0, 0] = bad
            with pytest.raises(ValueError, match="not finite"):
                call(wrong, t, x)
        for shape in ((2, 1, 3, 4), (1, 2, 3, 4), (2, 2, 4, 3)):
            with pytest.raises(ValueError, match=r"\[2, 2, 3, 4\], not "):
                call(x, t, torch.zeros(shape))
    with pytest.raises(ValueError, match="not finite"):
        process.loss(lambda x, t: x, x * math.nan, t, x)
    with pytest.raises(ValueError, match="shape"):
        process.loss(lambda x, t: x, x, t, x[:, :1])


def test_the_plain_loss_refuses_a_learned_variance() -> None:
    process = GaussianDiffusion(LINEAR, variance="learned_range")
    with pytest.raises(ValueError, match=r"losses\.hybrid or losses\.vlb"):
        process.loss(lambda x, t: torch.cat((x, x), dim=1), images(2), torch.tensor([1, 2]), images(2))


@pytest.mark.parametrize(
    ("t", "said"),
    [
        ([0, 5], r"1\.\.1000, not in 0\.\.5"),
        ([1, 1001], r"1\.\.1000, not in 1\.\.1001"),
        ([1.0, 2.0], "integer"),
        ([1, 2, 3], r"\[2\]"),
        ([[1], [2]], r"\[2\]"),
    ],
)
def test_bad_timesteps(t: list[float], said: str) -> None:
    process = GaussianDiffusion(LINEAR)
    x = images(2)
    for call in (
        lambda t: process.q_sample(x, t, x),
        lambda t: process.q_step(x, t, x),
        lambda t: process.posterior(x, x, t),
        lambda t: process.predict_x0(x, t, x),
        lambda t: process.loss(lambda x, t: x, x, t, x),
    ):
        with pytest.raises(ValueError, match=said):
            call(torch.tensor(t))


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match="eps, x0, v, mean, not 'epsilon'"):
        GaussianDiffusion(LINEAR, predict="epsilon")
    with pytest.raises(ValueError, match="small, large, learned_range, not 'medium'"):
        GaussianDiffusion(LINEAR, variance="medium")
