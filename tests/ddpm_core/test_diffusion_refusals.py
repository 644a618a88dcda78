"""What the process refuses, and how it says so."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, bits_per_dim_estimate, content_keys, losses
from ddpm_core.diffusion import PREDICTIONS, VARIANCES
from ddpm_core.timesteps import importance, uniform_density

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
        ([[1], [2]], r"\[N\], not torch.int64 \[2, 1\]"),
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


def test_timesteps_are_no_bare_number() -> None:
    process = GaussianDiffusion(LINEAR)
    with pytest.raises(ValueError, match=r"integer tensor .* not 3"):
        process.q_sample(images(2), 3, images(2))  # type: ignore[arg-type]


def test_small_integers_are_timesteps_and_no_mask() -> None:
    process = GaussianDiffusion(LINEAR)
    x, eps, t = images(3), images(3, 1), torch.tensor([1, 2, 255])
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(process.q_sample(x, t.to(dtype), eps), process.q_sample(x, t, eps))
        assert torch.equal(losses.min_snr()(process, t.to(dtype)), losses.min_snr()(process, t))


@pytest.mark.parametrize("call", [losses.min_snr(), losses.p2(), lambda p, t: importance(uniform_density(p), t)])
def test_weights_are_of_timesteps(call: Callable[[GaussianDiffusion, Tensor], Tensor]) -> None:
    process = GaussianDiffusion(LINEAR)
    for t in (0, 1001):
        with pytest.raises(ValueError, match=r"1\.\.1000"):
            call(process, torch.tensor([1, t]))


def test_coefficients_are_of_timesteps_and_names() -> None:
    process = GaussianDiffusion(LINEAR)
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        process.at("signal_rate", torch.tensor([0]), images(1))
    with pytest.raises(ValueError, match="'sigma': there are signal_rate, noise_rate"):
        process.at("sigma", torch.tensor([1]), images(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images_are_refused(dtype: torch.dtype) -> None:
    """Their dtype would round every coefficient to 0 or 1."""
    process, t = GaussianDiffusion(LINEAR), torch.tensor([1, 2])
    x, eps = images(2).clamp(0, 1).to(dtype), images(2)
    for call in (
        lambda: process.q_sample(x, t, eps),
        lambda: process.q_step(x, t, eps),
        lambda: process.posterior(x, eps, t),
        lambda: process.posterior(eps, x, t),
        lambda: process.target(x, t, eps),
        lambda: process.predict_x0(x, t, eps),
        lambda: process.loss(lambda x, t: x, x, t, eps),
        lambda: losses.vlb(process, lambda x, t: x, x, t, eps),
        lambda: content_keys(x),
        lambda: bits_per_dim_estimate(process, lambda x, t: x, x, 0, 4, content_keys=[1, 2]),
        lambda: UNet(UNetConfig(image_channels=2, channels=(4,), groups=2))(x, t),
    ):
        with pytest.raises(ValueError, match=r"floating-point tensor in \[-1, 1\].* not torch\."):
            call()


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_but_for_the_networks_answer(predict: str, bad: float) -> None:
    process, t = GaussianDiffusion(LINEAR, predict), torch.tensor([1, 2])
    x, wrong = images(2), images(2)
    wrong[1, 0, 0, 0] = bad
    reads = (process.predict_x0, process.predict_eps, process.predict_v, process.predict_mean)
    for read in (*reads, lambda x, t, output: process.reverse(x, t, output, False)):
        with pytest.raises(ValueError, match="not finite"):
            read(wrong, t, x)
        # Training shows by it that it diverged.
        answer = read(x, t, x * math.nan)
        assert (answer if isinstance(answer, Tensor) else answer.x0).isnan().all()
    for pair in ((wrong, x), (x, wrong)):
        with pytest.raises(ValueError, match="not finite"):
            process.posterior(*pair, t)


@pytest.mark.parametrize("predict", ["eps", "mean"])
def test_signal_that_float32_cannot_hold(predict: str) -> None:
    process = GaussianDiffusion(NoiseSchedule.constant(300, 0.5), predict)  # alpha_bar_T 5e-91
    x, t = images(2).double(), torch.tensor([300, 300])
    eps = images(2, 1).double()
    x_t, answer = process.q_sample(x, t, eps), process.target(x, t, eps)
    assert process.predict_x0(x_t, t, answer).isfinite().all()
    with pytest.raises(ValueError, match=f"{predict} on .* says nothing about x0 in torch.float32"):
        process.predict_x0(x_t.float(), t, answer.float())
    early = process.predict_x0(x_t.float(), torch.tensor([5, 7]), answer.float())  # there is signal there
    assert early.isfinite().all()


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match="eps, x0, v, mean, not 'epsilon'"):
        GaussianDiffusion(LINEAR, predict="epsilon")
    with pytest.raises(ValueError, match="small, large, learned_range, not 'medium'"):
        GaussianDiffusion(LINEAR, variance="medium")
