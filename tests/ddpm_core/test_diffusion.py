import math

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import GaussianDiffusion, NoiseSchedule
from ddpm_core.diffusion import evaluating

LINEAR = NoiseSchedule.linear()
PREDICTIONS = ["eps", "x0", "v"]


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_iterated_steps_are_the_closed_form() -> None:
    """Both are linear in (x, eps): follow mean and variance through all 1000 steps."""
    process = GaussianDiffusion(LINEAR)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    mean, variance = one * 0.7, zero
    for t in range(1, 1001):
        step = torch.tensor([t])
        mean = process.q_step(mean, step, zero)
        variance = process.q_step(variance.sqrt(), step, zero) ** 2 + process.q_step(zero, step, one) ** 2
        torch.testing.assert_close(mean, process.q_sample(one * 0.7, step, zero), rtol=1e-10, atol=0)
        torch.testing.assert_close(variance, process.q_sample(zero, step, one) ** 2, rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_iterated_noise_is_the_closed_form_in_distribution() -> None:
    process = GaussianDiffusion(NoiseSchedule.linear(20, 0.01, 0.2))
    generator = torch.Generator().manual_seed(0)
    x = torch.full((40_000, 1), 0.8, dtype=torch.float64)
    for t in range(1, 21):
        x = process.q_step(x, torch.tensor([t]), torch.randn(x.shape, generator=generator, dtype=x.dtype))
    signal, noise = process.schedule.signal_rate[-1], process.schedule.noise_rate[-1]
    assert x.mean().item() == pytest.approx(0.8 * signal.item(), abs=4 * noise.item() / 200)
    assert x.var().item() == pytest.approx(noise.item() ** 2, rel=4 * math.sqrt(2 / 40_000))


@pytest.mark.parametrize("t", [2, 3, 50, 400, 1000])
def test_posterior_is_bayes_rule(t: int) -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): normalised on a grid."""
    x0 = 0.4
    beta, alpha_bar = LINEAR.beta.tolist(), LINEAR.alpha_bar.tolist()
    before, now = alpha_bar[t - 2], alpha_bar[t - 1]
    x_t = math.sqrt(now) * x0 - 1.3 * math.sqrt(1 - now)
    likelihood_mean, likelihood_std = x_t / math.sqrt(1 - beta[t - 1]), math.sqrt(beta[t - 1] / (1 - beta[t - 1]))
    grid = likelihood_mean + torch.linspace(-12, 12, 200_001, dtype=torch.float64) * likelihood_std
    log_density = -((x_t - math.sqrt(1 - beta[t - 1]) * grid) ** 2) / (2 * beta[t - 1]) - (
        grid - math.sqrt(before) * x0
    ) ** 2 / (2 * (1 - before))
    weight = (log_density - log_density.max()).exp()
    weight /= weight.sum()
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()

    process = GaussianDiffusion(LINEAR)
    got = process.posterior(torch.tensor([x0]).double(), torch.tensor([x_t]).double(), torch.tensor([t]))
    torch.testing.assert_close(got[0][0], mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got[1][0], variance, rtol=1e-6, atol=0)


def test_posterior_ends_at_the_image() -> None:
    x0, x_1 = images(3), images(3, 1)
    mean, variance = GaussianDiffusion(LINEAR).posterior(x0, x_1, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(mean, x0, rtol=1e-10, atol=1e-12)
    assert variance.shape == x0.shape
    assert (variance == 0).all()


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine().respace(13, "trailing")])
def test_the_target_converts_back(predict: str, schedule: NoiseSchedule) -> None:
    process = GaussianDiffusion(schedule, predict=predict)
    t = torch.linspace(1, schedule.timesteps, 8).long()
    x0, eps = images(8), images(8, 1)
    x_t = process.q_sample(x0, t, eps)
    target = process.target(x0, t, eps)
    # Dividing by the signal rate at cosine's end, 5e-5, costs five digits of float64.
    torch.testing.assert_close(process.predict_x0(x_t, t, target), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.predict_eps(x_t, t, target), eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("predict", ["x0", "v"])
def test_zero_terminal_signal_can_be_predicted(predict: str) -> None:
    process = GaussianDiffusion(LINEAR.rescale_zero_terminal(), predict=predict)
    t = torch.tensor([1000])
    x0, eps = images(1), images(1, 1)
    x_t = process.q_sample(x0, t, eps)
    torch.testing.assert_close(x_t, eps)
    torch.testing.assert_close(process.predict_x0(x_t, t, process.target(x0, t, eps)), x0)
    mean, variance = process.posterior(x0, x_t, t)
    assert mean.isfinite().all()
    assert (variance > 0).all()
    with pytest.raises(ValueError, match="predict v or x0"):
        GaussianDiffusion(LINEAR.rescale_zero_terminal(), predict="eps")


@pytest.mark.parametrize("variance", ["small", "large"])
def test_reverse_is_the_posterior_of_the_predicted_x0(variance: str) -> None:
    process = GaussianDiffusion(LINEAR, predict="x0", variance=variance)
    t = torch.tensor([1, 2, 1000])
    x_t, output = images(3), 3 * images(3, 1)
    mean, model_variance, x0 = process.reverse(x_t, t, output, clip_x0=True)
    assert torch.equal(x0, output.clamp(-1, 1))
    torch.testing.assert_close(mean, process.posterior(x0, x_t, t)[0])
    small, beta = LINEAR.posterior_variance, LINEAR.beta
    expected = [small[1], small[1], small[999]] if variance == "small" else [small[1], beta[1], beta[999]]
    assert model_variance[:, 0, 0, 0].tolist() == [v.item() for v in expected]


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_loss_is_the_weighted_squared_error(predict: str) -> None:
    process = GaussianDiffusion(LINEAR, predict=predict)
    x0, eps, answer = images(4).float(), images(4, 1).float(), images(4, 2).float()
    t = torch.tensor([1, 10, 500, 1000])
    seen = []

    def model(x_t: Tensor, timestep: Tensor) -> Tensor:
        seen.append((x_t, timestep))
        return answer

    loss = process.loss(model, x0, t, eps)
    expected = [((answer[i] - process.target(x0, t, eps)[i]) ** 2).mean().item() for i in range(4)]
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(seen[0][0], process.q_sample(x0, t, eps))
    assert seen[0][1].tolist() == [0, 9, 499, 999]

    weighted = process.loss(model, x0, t, eps, weighting=lambda process, t: process.schedule.beta[t - 1])
    assert weighted.tolist() == pytest.approx((loss * LINEAR.beta[t - 1]).tolist(), rel=1e-6)


def test_a_respaced_process_calls_the_network_with_original_timesteps() -> None:
    process = GaussianDiffusion(LINEAR).respace(10, "trailing")
    got = process.call(lambda x, timestep: timestep, images(3), torch.tensor([1, 5, 10]))
    assert got.tolist() == [99, 499, 999]


def test_coefficients_are_rounded_once() -> None:
    process = GaussianDiffusion(LINEAR)
    t = torch.arange(1, 1001)
    got = process.at("noise_rate", t, torch.zeros(1000, 1, 1, 1))
    assert got.shape == (1000, 1, 1, 1)
    assert torch.equal(got.flatten(), LINEAR.noise_rate.float())


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


def test_evaluating_puts_every_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[0].eval()

    def fail_inside() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert torch.is_inference_mode_enabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert [module.training for module in model.modules()] == [True, False, True, True]
