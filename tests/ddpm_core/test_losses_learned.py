"""The bound with a learned variance, and the hybrid loss, against torch.distributions and autograd."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_core import GaussianDiffusion, NoiseSchedule, losses
from ddpm_core.diffusion import PREDICTIONS
from tests.ddpm_core.gaussian_oracle import answers
from tests.ddpm_core.loss_helpers import LEARNED, LINEAR, level_nll, mean_of, noised, pixelwise, takes_for

STEPS = torch.tensor([2, 50, 400, 1000])


def learned_output(t: Tensor, x0: Tensor, guess: Tensor, eps: Tensor) -> Tensor:
    """What the network says: float32 [N, 4, 5, 5], a leaf. The variance's half is anything."""
    said = answers(LINEAR, guess, LEARNED.q_sample(x0, t, eps), t)["eps"]
    return torch.cat((said, eps.roll(1, dims=2) / 2), dim=1).float().requires_grad_()


def divergence(t: Tensor, x0: Tensor, eps: Tensor, output: Tensor) -> Tensor:
    """KL of the learned reverse step, bits per dimension [N], by torch.distributions."""
    x_t = LEARNED.q_sample(x0, t, eps)
    said, choice = output.double().chunk(2, dim=1)
    tilde, beta, alpha_bar = (pixelwise(c, t) for c in (LINEAR.posterior_variance, LINEAR.beta, LINEAR.alpha_bar))
    guess = (x_t - (1 - alpha_bar).sqrt() * said) / alpha_bar.sqrt()
    mean, model_mean = (answers(LINEAR, x, x_t, t)["mean"] for x in (x0, guess))
    variance = tilde * (beta / tilde) ** ((choice + 1) / 2)
    return mean_of(kl_divergence(Normal(mean, tilde.sqrt()), Normal(model_mean, variance.sqrt()))) / math.log(2)


def gradient(loss: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """That by the prediction and that by what chooses the variance, in float64."""
    (grad,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
    prediction, choice = grad.double().chunk(2, dim=1)
    return prediction, choice


def test_vlb_with_a_learned_variance_and_its_gradient() -> None:
    x0, guess, eps = noised(STEPS)
    output = learned_output(STEPS, x0, guess, eps)
    got = losses.vlb(LEARNED, lambda x, t: output, x0, STEPS, eps)
    expected = divergence(STEPS, x0, eps, output)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    for mine, other in zip(gradient(got, output), gradient(expected, output), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-9)


def test_vlb_at_1_with_a_learned_variance() -> None:
    """The decoder's term with the variance chosen between beta_tilde_2 and beta_1; its gradient is finite."""
    t = torch.tensor([1, 1])
    x0, _, eps = noised(t)
    x0[0, 0, 0, 0], x0[0, 0, 0, 1] = -1, 1
    guess = x0 + 0.01 * eps.flip(0)
    output = learned_output(t, x0, guess, eps)
    got = losses.vlb(LEARNED, lambda x, t: output, x0, t, eps)
    low, high = LINEAR.posterior_variance[1], LINEAR.beta[0]
    std = (low * (high / low) ** ((output[:, 2:].detach().double() + 1) / 2)).sqrt()
    torch.testing.assert_close(got.double(), mean_of(level_nll(x0, guess, std)) / math.log(2), rtol=1e-5, atol=0)
    assert all(half.isfinite().all() and half.abs().max() > 0 for half in gradient(got, output))


def test_the_best_learned_variance_is_the_posteriors_and_the_means_error() -> None:
    """The divergence from N(mu, s) to N(mu', s') is least at s' = s + (mu - mu')^2: there the gradient vanishes."""
    x0, guess, eps = noised(STEPS)
    guess = x0 + (guess - x0) / 10
    x_t = LEARNED.q_sample(x0, STEPS, eps)
    mean, model_mean = (answers(LINEAR, x, x_t, STEPS)["mean"] for x in (x0, guess))
    tilde, beta = pixelwise(LINEAR.posterior_variance, STEPS), pixelwise(LINEAR.beta, STEPS)
    best = 2 * ((tilde + (mean - model_mean) ** 2) / tilde).log() / (beta / tilde).log() - 1
    prediction = answers(LINEAR, guess, x_t, STEPS)["eps"]

    def by_choice(choice: Tensor) -> Tensor:
        output = torch.cat((prediction, choice), dim=1).requires_grad_()
        return gradient(losses.hybrid(LEARNED, lambda x, t: output, x0, STEPS, eps), output)[1]

    shallow, steep = by_choice(best), by_choice(best + 0.5)
    assert (shallow.abs() < 1e-6 * steep.abs().amax((1, 2, 3), keepdim=True)).all()
    assert (steep > 0).all()
    assert (by_choice(best - 0.5) < 0).all()


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("weight", [0.001, 0.1])
def test_hybrid_is_the_simple_loss_and_the_bound_with_the_mean_held_fixed(predict: str, weight: float) -> None:
    process = GaussianDiffusion(LINEAR, predict, "learned_range")
    t = torch.tensor([1, 2, 50, 400, 1000])
    x0, guess, eps = noised(t)
    said = takes_for(process, guess)(process.q_sample(x0, t, eps), t - 1)
    output = torch.cat((said, eps.flip(0)), dim=1).float().requires_grad_()

    def model(x_t: Tensor, timestep: Tensor) -> Tensor:
        return output

    weighting = losses.min_snr(3.0)
    got = losses.hybrid(process, model, x0, t, eps, weighting, weight)
    simple = GaussianDiffusion(LINEAR, predict).loss(lambda x, t: output[:, :2], x0, t, eps, weighting)
    bound = losses.vlb(process, model, x0, t, eps)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, simple + weight * 1000 * bound)
    by_prediction, by_choice = gradient(got, output)
    torch.testing.assert_close(by_prediction, gradient(simple, output)[0])
    torch.testing.assert_close(by_choice, weight * 1000 * gradient(bound, output)[1])
    assert gradient(bound, output)[0].abs().max() > 0  # it would have moved the mean
    alone = losses.hybrid(process, model, x0, t, eps, weighting, vlb_weight=0)
    assert gradient(alone, output)[1].abs().max() == 0


def test_hybrids_defaults_are_the_papers() -> None:
    """Nichol and Dhariwal 2021, eq. 16, lambda = 0.001, L_simple unweighted."""
    x0, guess, eps = noised(STEPS)
    output = learned_output(STEPS, x0, guess, eps)
    said = answers(LINEAR, guess, LEARNED.q_sample(x0, STEPS, eps), STEPS)["eps"]
    expected = mean_of((said - eps) ** 2) + 0.001 * 1000 * divergence(STEPS, x0, eps, output)
    got = losses.hybrid(LEARNED, lambda x, t: output, x0, STEPS, eps)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_hybrid_trains_a_learned_variance(variance: str) -> None:
    x0, _, eps = noised(STEPS)
    with pytest.raises(ValueError, match=f"not a fixed one .{variance}"):
        losses.hybrid(GaussianDiffusion(LINEAR, variance=variance), lambda x, t: x, x0, STEPS, eps)


@pytest.mark.parametrize("channels", [1, 3])
def test_hybrid_names_an_output_of_another_shape(channels: int) -> None:
    x0 = torch.zeros(4, channels, 5, 5)
    with pytest.raises(ValueError, match=r"shape|second half"):
        losses.hybrid(LEARNED, lambda x, t: x, x0, STEPS, x0)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_vlb_is_the_divergence_in_bits_at_every_timestep(predict: str) -> None:
    """With the large variance, whose constant does not train but counts."""
    schedule = NoiseSchedule.cosine(20)
    process = GaussianDiffusion(schedule, predict, "large")
    t = torch.arange(1, 21)
    x0, guess, eps = noised(t)
    guess[0] = x0[0] + 0.01 * eps[0]
    x_t = process.q_sample(x0, t, eps)
    mean, model_mean = (answers(schedule, x, x_t, t)["mean"][1:] for x in (x0, guess))
    tilde, beta = (pixelwise(column, t)[1:].sqrt() for column in (schedule.posterior_variance, schedule.beta))
    expected = mean_of(kl_divergence(Normal(mean, tilde), Normal(model_mean, beta)))
    decoder = mean_of(level_nll(x0[:1], guess[:1], schedule.posterior_variance[1].sqrt()))
    got = losses.vlb(process, takes_for(process, guess), x0, t, eps)
    torch.testing.assert_close(got.double(), torch.cat((decoder, expected)) / math.log(2), rtol=1e-5, atol=0)
