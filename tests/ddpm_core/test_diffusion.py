"""The process: forward and posterior against iteration and Bayes' rule, what is predicted against the truth."""

import math

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import GaussianDiffusion, NoiseSchedule
from ddpm_core.diffusion import PREDICTIONS, VARIANCES, evaluating
from tests.ddpm_core.gaussian_oracle import answers

LINEAR = NoiseSchedule.linear()
COSINE = NoiseSchedule.cosine()
ZERO_TERMINAL = LINEAR.rescale_zero_terminal()


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
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, COSINE.respace(13, "trailing")], ids=repr)
def test_every_target_converts_into_every_other(predict: str, schedule: NoiseSchedule) -> None:
    process = GaussianDiffusion(schedule, predict=predict)
    t = torch.linspace(1, schedule.timesteps, 8).long()
    x0, eps = images(8), images(8, 1)
    x_t, target = process.q_sample(x0, t, eps), process.target(x0, t, eps)
    rates = [rate[t - 1].view(-1, 1, 1, 1) for rate in (schedule.signal_rate, schedule.noise_rate)]
    torch.testing.assert_close(x_t, rates[0] * x0 + rates[1] * eps, rtol=1e-12, atol=1e-12)
    expected = answers(schedule, x0, x_t, t)
    torch.testing.assert_close(expected["eps"], eps, rtol=1e-10, atol=1e-10)
    # In fewer steps, the network still answers for the one it was trained on.
    trained = answers(schedule.original, x0, x_t, schedule.original_timesteps[t - 1])
    torch.testing.assert_close(target, trained[predict], rtol=1e-10, atol=1e-10)
    # Dividing by the signal rate at cosine's end, 5e-5, costs five digits of float64; so does a mean's factor of x0.
    for name in PREDICTIONS:
        got = getattr(process, f"predict_{name}")(x_t, t, target)
        torch.testing.assert_close(got, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("predict", ["x0", "v", "mean"])
def test_zero_terminal_signal_can_be_predicted(predict: str) -> None:
    process = GaussianDiffusion(ZERO_TERMINAL, predict=predict)
    t = torch.tensor([1000, 999, 1])
    x0, eps = images(3), images(3, 1)
    x_t = process.q_sample(x0, t, eps)
    assert torch.equal(x_t[0], eps[0])
    target = process.target(x0, t, eps)
    expected = {"x0": x0[0], "v": -x0[0], "mean": ZERO_TERMINAL.signal_rate[998] * x0[0]}
    torch.testing.assert_close(target[0], expected[predict])
    torch.testing.assert_close(process.predict_x0(x_t, t, target), x0)
    torch.testing.assert_close(process.predict_eps(x_t, t, target), eps)
    mean, variance = process.posterior(x0, x_t, t)
    torch.testing.assert_close(process.predict_mean(x_t, t, target), mean)
    # No signal at T: q(x_{T-1} | x_T, x_0) is q(x_{T-1} | x_0).
    torch.testing.assert_close(mean[0], ZERO_TERMINAL.signal_rate[998] * x0[0])
    torch.testing.assert_close(variance[0], (ZERO_TERMINAL.noise_rate[998] ** 2).expand_as(variance[0]))


@pytest.mark.parametrize("predict", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_a_respaced_process_understands_the_network_that_was_trained(predict: str, spacing: str) -> None:
    whole = GaussianDiffusion(LINEAR, predict=predict)
    process = whole.respace(20, spacing)
    t, original = torch.tensor([1, 2, 10, 20]), process.schedule.original_timesteps[[0, 1, 9, 19]]
    x0, eps = images(4), images(4, 1)
    x_t, answer = whole.q_sample(x0, original, eps), whole.target(x0, original, eps)
    torch.testing.assert_close(process.q_sample(x0, t, eps), x_t)
    torch.testing.assert_close(process.predict_x0(x_t, t, answer), x0)
    torch.testing.assert_close(process.predict_eps(x_t, t, answer), eps)
    torch.testing.assert_close(process.predict_mean(x_t, t, answer), process.posterior(x0, x_t, t)[0])


@pytest.mark.parametrize(
    ("predict", "schedule", "amplified"),
    [("mean", LINEAR, 7_000), ("mean", COSINE, 600), ("eps", LINEAR, 150), ("eps", COSINE, 20_000)],
    ids=lambda value: repr(value),
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_output_is_reckoned_in_float32(
    predict: str, schedule: NoiseSchedule, amplified: float, dtype: torch.dtype
) -> None:
    """At T an error of the output comes back many times larger in x0: what half precision rounded is lost, but no
    more is lost in reckoning.
    """
    process = GaussianDiffusion(schedule, predict=predict)
    t = torch.tensor([1000])
    x0, eps = images(1), images(1, 1)
    x_t = process.q_sample(x0, t, eps).to(dtype)
    output = process.target(x0, t, eps).to(dtype)
    exact = process.predict_x0(x_t.double(), t, output.double())  # what these very inputs stand for
    got = process.predict_x0(x_t, t, output)
    assert got.dtype == torch.float32
    nudged = process.predict_x0(x_t.double(), t, output.double() + 1e-6)
    assert (nudged - exact).abs().min() > amplified * 1e-6
    # A few roundings of float32 (6e-8 each) in numbers of about 3, amplified; one of float16 would cost 5e-4 as much.
    error = (got - exact).abs().max().item()
    assert error < 3e-6 * amplified
    assert torch.finfo(dtype).eps * amplified > 100 * error
    for name in ("eps", "v", "mean"):
        assert getattr(process, f"predict_{name}")(x_t, t, output).dtype == torch.float32


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_a_learned_variance_lies_between_the_two_fixed_ones_by_logarithm(predict: str) -> None:
    process = GaussianDiffusion(LINEAR, predict=predict, variance="learned_range")
    t = torch.tensor([2, 10, 400, 1000])
    beta, tilde = (column[t - 1].view(-1, 1, 1, 1) for column in (LINEAR.beta, LINEAR.posterior_variance))
    x_t, prediction = images(4), images(4, 1)

    def variance(choice: float) -> Tensor:
        return process.predict_variance(x_t, t, torch.cat((prediction, torch.full_like(prediction, choice)), dim=1))

    torch.testing.assert_close(variance(-1), tilde.expand_as(x_t))
    torch.testing.assert_close(variance(0), (tilde * beta).sqrt().expand_as(x_t))
    torch.testing.assert_close(variance(1), beta.expand_as(x_t))
    torch.testing.assert_close(variance(3), (beta**2 / tilde).expand_as(x_t))  # not confined to -1..1
    # Each pixel has its own, and the prediction is read as if it stood alone.
    choice = images(4, 2)
    output = torch.cat((prediction, choice), dim=1)
    expected = tilde * (beta / tilde) ** ((choice + 1) / 2)
    torch.testing.assert_close(process.predict_variance(x_t, t, output), expected)
    alone = GaussianDiffusion(LINEAR, predict=predict)
    assert torch.equal(process.predict_x0(x_t, t, output), alone.predict_x0(x_t, t, prediction))
    assert torch.equal(process.predict_x0(x_t, t, prediction), alone.predict_x0(x_t, t, prediction))
    mean, got, _ = process.reverse(x_t, t, output, clip_x0=False)
    torch.testing.assert_close(got, expected)
    assert torch.equal(mean, alone.reverse(x_t, t, prediction, clip_x0=False).mean)


def test_the_variance_at_1_is_clipped_as_documented() -> None:
    """beta_tilde_1 is 0: beta_tilde_2 stands in for it, in the learned range too; with a single timestep, beta."""
    x, one = images(1), torch.tensor([1])
    tilde_2, beta_1 = LINEAR.posterior_variance[1].item(), LINEAR.beta[0].item()

    def variance(choice: float) -> float:
        process = GaussianDiffusion(LINEAR, variance="learned_range")
        output = torch.cat((x, torch.full_like(x, choice)), dim=1)
        return process.predict_variance(x, one, output)[0, 0, 0, 0].item()

    got = [GaussianDiffusion(LINEAR, variance=name).predict_variance(x, one, x).max().item() for name in VARIANCES[:2]]
    assert got == [tilde_2, tilde_2]
    assert [variance(v) for v in (-1, 0, 1)] == pytest.approx([tilde_2, math.sqrt(tilde_2 * beta_1), beta_1])
    single = NoiseSchedule.from_betas([0.9995])
    for name in VARIANCES:
        process = GaussianDiffusion(single, variance=name)
        output = torch.cat((x, x), dim=1) if name == "learned_range" else x
        torch.testing.assert_close(process.predict_variance(x, one, output), torch.full_like(x, 0.9995))


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_half_precision_is_rounded_once(predict: str, dtype: torch.dtype) -> None:
    """Against the same in float64: where coefficients and products are rounded too, pixels that nearly cancel are off
    by far more than a unit in the last place.
    """
    process = GaussianDiffusion(LINEAR, predict)
    t = torch.tensor([1, 10, 500, 1000])
    x0, eps, x_t = (images(4, seed).to(dtype) for seed in range(3))
    wide = [x0.double(), t, eps.double()]
    for got, exact in (
        (process.q_sample(x0, t, eps), process.q_sample(*wide)),
        (process.q_step(x0, t, eps), process.q_step(*wide)),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-7)
    mean, variance = process.posterior(x0, x_t, t)
    exact_mean, exact_variance = process.posterior(x0.double(), x_t.double(), t)
    assert mean.dtype == variance.dtype == process.target(x0, t, eps).dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact_variance, rtol=1e-6, atol=0)
    if predict == "v":
        torch.testing.assert_close(process.target(x0, t, eps).double(), process.target(*wide), rtol=1e-5, atol=1e-6)


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
