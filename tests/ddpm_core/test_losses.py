"""The losses against torch.distributions, closed forms of the papers, and autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_core import GaussianDiffusion, NoiseSchedule, losses
from ddpm_core.diffusion import PREDICTIONS
from tests.ddpm_core.gaussian_oracle import answers
from tests.ddpm_core.loss_helpers import GRID, LEARNED, LINEAR, level_nll, mean_of, noised, pixelwise, takes_for


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.123, 0.999])
@pytest.mark.parametrize("std", [1e-3, 7e-3, 0.1, 2.0])
def test_the_256_levels_share_all_probability(mean: float, std: float) -> None:
    nll = losses.decoder_nll(GRID, torch.full_like(GRID, mean), torch.full_like(GRID, std**2))
    assert (-nll).exp().sum().item() == pytest.approx(1, rel=1e-9)


def test_decoder_is_the_integral_of_the_density() -> None:
    for x0, mean, std in [(GRID[100], -0.2, 0.01), (GRID[3], -0.9, 0.05), (GRID[200], 0.6, 0.3)]:
        points = torch.linspace(x0 - 1 / 255, x0 + 1 / 255, 20_001, dtype=torch.float64)
        density = Normal(torch.tensor(mean).double(), torch.tensor(std).double()).log_prob(points)
        mass = torch.trapezoid(density.exp(), points)
        nll = losses.decoder_nll(x0, torch.tensor(mean).double(), torch.tensor(std).double() ** 2)
        assert nll.item() == pytest.approx(-mass.log().item(), rel=1e-6)


@pytest.mark.parametrize("side", [-1, 1])
def test_decoder_keeps_its_digits_in_the_tails(side: int) -> None:
    """25 standard deviations out, against erfc; and far further, where nothing else in float64 can follow."""
    std, mean = 0.01, -0.25 * side + GRID[128].item()
    low, high = 0.25 / std - 1 / 255 / std, 0.25 / std + 1 / 255 / std
    mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
    args = torch.tensor([mean, std**2], dtype=torch.float64)
    assert losses.decoder_nll(GRID[128], *args).item() == pytest.approx(-math.log(mass), rel=1e-9)
    far = losses.decoder_nll(GRID[[0, 255]], torch.tensor([1.0, -1.0]).double(), torch.tensor(1e-6).double())
    assert far.tolist() == pytest.approx([(2 - 1 / 255) ** 2 / 2e-6] * 2, rel=1e-4)


def test_kl_is_that_of_torch_distributions() -> None:
    a, b = torch.rand(2, 50, dtype=torch.float64), torch.rand(2, 50, dtype=torch.float64) + 0.1
    expected = kl_divergence(Normal(a[0], b[0].sqrt()), Normal(a[1], b[1].sqrt()))
    torch.testing.assert_close(losses.gaussian_kl(a[0], b[0], a[1], b[1]), expected)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_vlb_term(variance: str, predict: str) -> None:
    """Against the form by signal-to-noise ratio (small) and torch.distributions (large); t = 1 is the decoder's."""
    schedule = NoiseSchedule.cosine(100)
    process = GaussianDiffusion(schedule, predict=predict, variance=variance)
    generator = torch.Generator().manual_seed(0)
    x0 = GRID[torch.randint(0, 256, (4, 1, 5, 5), generator=generator)]
    eps, output = torch.randn(2, 4, 1, 5, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([1, 2, 50, 99])
    x_t = process.q_sample(x0, t, eps)
    got = losses.vlb_term(process, x0, x_t, t, output, clip_x0=False)
    prediction = process.predict_x0(x_t, t, output)
    decoder = losses.decoder_nll(x0[0], prediction[0], schedule.posterior_variance[1])
    assert got[0].item() == pytest.approx(decoder.mean().item() / math.log(2))
    snr = schedule.log_snr.exp()
    for i in (1, 2, 3):
        if variance == "small":
            kl = (snr[t[i] - 2] - snr[t[i] - 1]) / 2 * (x0[i] - prediction[i]) ** 2
        else:
            one = torch.tensor([int(t[i])])
            mean, small = process.posterior(x0[i : i + 1], x_t[i : i + 1], one)
            model_mean, _ = process.posterior(prediction[i : i + 1], x_t[i : i + 1], one)
            kl = kl_divergence(Normal(mean, small.sqrt()), Normal(model_mean, schedule.beta[t[i] - 1].sqrt()))
        assert got[i].item() == pytest.approx(kl.mean().item() / math.log(2), rel=1e-6)


def test_clipping_helps_a_wild_network() -> None:
    process = GaussianDiffusion(NoiseSchedule.linear())
    x0 = GRID[:64].view(1, 1, 8, 8)
    t = torch.tensor([700])
    x_t = process.q_sample(x0, t, torch.zeros_like(x0))
    wild, clipped = (losses.vlb_term(process, x0, x_t, t, 5 * torch.ones_like(x0), clip) for clip in (False, True))
    assert clipped < wild


def test_prior_term() -> None:
    process = GaussianDiffusion(NoiseSchedule.linear())
    x0 = GRID[:192].view(3, 1, 8, 8)
    q = Normal(x0 * process.schedule.signal_rate[-1], process.schedule.noise_rate[-1])
    expected = kl_divergence(q, Normal(0.0, 1.0)).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(losses.prior_term(process, x0), expected, rtol=1e-6, atol=0)
    zero = GaussianDiffusion(NoiseSchedule.linear().rescale_zero_terminal(), predict="v")
    assert losses.prior_term(zero, x0).tolist() == [0, 0, 0]


# One denoiser, said in every parameterisation.


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine(1000)], ids=["linear", "cosine"])
def test_mean_matching_is_the_divergence_in_nats(predict: str, variance: str, schedule: NoiseSchedule) -> None:
    """With the small variance exactly; with the large one but for the constant, the divergence at equal means."""
    process = GaussianDiffusion(schedule, predict, variance)
    t = torch.tensor([2, 3, 50, 400, 999, 1000])
    x0, guess, eps = noised(t)
    got = losses.mean_matching(process, takes_for(process, guess), x0, t, eps)
    x_t = process.q_sample(x0, t, eps)
    tilde = pixelwise(schedule.posterior_variance, t).sqrt()
    sigma = tilde if variance == "small" else pixelwise(schedule.beta, t).sqrt()
    mean, model_mean = (answers(schedule, x, x_t, t)["mean"] for x in (x0, guess))
    kl = kl_divergence(Normal(mean, tilde), Normal(model_mean, sigma))
    constant = kl_divergence(Normal(mean, tilde), Normal(mean, sigma))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), mean_of(kl - constant), rtol=1e-5, atol=0)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_mean_matching_at_1_is_the_decoders_term(predict: str, variance: str) -> None:
    """The probability of each 8-bit level under N(predicted x0, beta_tilde_2), among images at other timesteps."""
    process = GaussianDiffusion(LINEAR, predict, variance)
    t = torch.tensor([1, 700, 1])
    x0, _, eps = noised(t)
    guess = x0 + 0.01 * eps.flip(0)  # near enough for a difference of CDFs
    got = losses.mean_matching(process, takes_for(process, guess), x0, t, eps)
    nll = mean_of(level_nll(x0, guess, LINEAR.posterior_variance[1].sqrt()))
    torch.testing.assert_close(got[[0, 2]].double(), nll[[0, 2]], rtol=1e-5, atol=0)
    assert not got[1].isclose(nll[1].float())


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_mean_matching_is_the_papers_weighted_error_of_eps(predict: str, variance: str) -> None:
    """DDPM, eq. 12: beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) |eps - eps_theta|^2."""
    process = GaussianDiffusion(LINEAR, predict, variance)
    t = torch.tensor([2, 50, 400, 1000])
    x0, guess, eps = noised(t)
    got = losses.mean_matching(process, takes_for(process, guess), x0, t, eps)
    beta = pixelwise(LINEAR.beta, t)
    sigma2 = pixelwise(LINEAR.posterior_variance, t) if variance == "small" else beta
    weight = beta**2 / (2 * sigma2 * (1 - beta) * (1 - pixelwise(LINEAR.alpha_bar, t)))
    error = eps - answers(LINEAR, guess, process.q_sample(x0, t, eps), t)["eps"]
    torch.testing.assert_close(got.double(), mean_of(weight * error**2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_mean_matching_in_single_precision(predict: str) -> None:
    """As it trains: float32 in, and gradients that are finite, at t = 1 and at black and white pixels too."""
    process = GaussianDiffusion(LINEAR, predict)
    t = torch.tensor([1, 2, 50, 400, 900, 1000])
    x0, guess, eps = noised(t)
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = -1, 1
    exact = losses.mean_matching(process, takes_for(process, guess), x0, t, eps)
    network = takes_for(process, guess)
    output: list[Tensor] = []

    def single(x_t: Tensor, timestep: Tensor) -> Tensor:
        output.append(network(x_t, timestep).float().requires_grad_())
        return output[0]

    got = losses.mean_matching(process, single, x0.float(), t, eps.float())
    assert got.dtype == torch.float32
    # Means differ by 4e-5 at T, where float32 keeps 6e-8 of them: three digits, of a loss of 1e-8.
    torch.testing.assert_close(got, exact, rtol=3e-3, atol=0)
    got.sum().backward()
    assert output[0].grad is not None
    assert output[0].grad.isfinite().all()
    assert (output[0].grad.flatten(1).abs().amax(1) > 0).all()


def test_mean_matching_takes_a_fixed_variance() -> None:
    x0, _, eps = noised(torch.tensor([1]))
    with pytest.raises(ValueError, match="fixed variance"):
        losses.mean_matching(LEARNED, lambda x, t: torch.cat((x, x), dim=1), x0, torch.tensor([1]), eps)


def snr(t: Tensor) -> Tensor:
    return LINEAR.alpha_bar[t - 1] / (1 - LINEAR.alpha_bar[t - 1])


# At 600 a mean differs from its target by 1e-3 of the error of x0: float32 keeps four digits of that.
WEIGHTED = torch.tensor([1, 2, 50, 300, 600])


def weighted_loss(predict: str, weighting: losses.Weighting, predicted_from: Tensor = WEIGHTED) -> Tensor:
    process = GaussianDiffusion(LINEAR, predict)
    x0, guess, eps = noised(predicted_from)
    return process.loss(takes_for(process, guess), x0, predicted_from, eps, weighting).double()


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
def test_min_snr_weighs_a_denoiser_alike_whatever_it_predicts(predict: str, gamma: float) -> None:
    """min(SNR, gamma) on the squared error of x0 (Hang et al. 2023, section 3.4)."""
    x0, guess, _ = noised(WEIGHTED)
    expected = snr(WEIGHTED).clamp(max=gamma) * mean_of((x0 - guess) ** 2)
    torch.testing.assert_close(weighted_loss(predict, losses.min_snr(gamma)), expected, rtol=3e-4, atol=0)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_p2_weighs_a_denoiser_alike_whatever_it_predicts(predict: str, gamma: float, k: float) -> None:
    """1 / (k + SNR)^gamma on the squared error of eps (Choi et al. 2022, eq. 8), which is SNR times that of x0."""
    x0, guess, _ = noised(WEIGHTED)
    expected = snr(WEIGHTED) / (k + snr(WEIGHTED)) ** gamma * mean_of((x0 - guess) ** 2)
    torch.testing.assert_close(weighted_loss(predict, losses.p2(gamma, k)), expected, rtol=3e-4, atol=0)


def test_the_weightings_of_eps_and_v_are_the_papers() -> None:
    """min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1): Hang et al. 2023, for SNR above and below gamma."""
    t = torch.tensor([1, 100, 1000])
    assert snr(t)[1] > 5 > snr(t)[2]
    weights = {p: losses.min_snr(5.0)(GaussianDiffusion(LINEAR, p), t).double() for p in ("eps", "v", "x0")}
    torch.testing.assert_close(weights["eps"], torch.minimum(torch.ones(3).double(), 5 / snr(t)))
    torch.testing.assert_close(weights["v"], torch.minimum(snr(t), torch.full((3,), 5.0).double()) / (snr(t) + 1))
    torch.testing.assert_close(weights["x0"], torch.minimum(snr(t), torch.full((3,), 5.0).double()))


@pytest.mark.parametrize("predict", ["x0", "v", "mean"])
@pytest.mark.parametrize("weighting", [losses.min_snr(), losses.p2()], ids=["min_snr", "p2"])
def test_weightings_at_zero_terminal_signal(predict: str, weighting: losses.Weighting) -> None:
    """SNR is 0 there, and so is the weight, whatever the network says of x0."""
    process = GaussianDiffusion(LINEAR.rescale_zero_terminal(), predict)
    assert weighting(process, torch.tensor([1000])).tolist() == [0]
    assert (weighting(process, torch.tensor([1, 999])) > 0).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: losses.min_snr(0), "gamma must be above 0, and finite, not 0"),
        (lambda: losses.min_snr(math.inf), "not inf"),
        (lambda: losses.p2(math.nan), "not gamma nan"),
        (lambda: losses.min_snr(math.nan), "gamma must be above 0"),
        (lambda: losses.p2(-1), "gamma >= 0 and k > 0"),
        (lambda: losses.p2(1, 0), "gamma >= 0 and k > 0"),
        (lambda: losses.p2(math.nan), "gamma >= 0 and k > 0"),
    ],
)
def test_weightings_that_cannot_be(make: Callable[[], losses.Weighting], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
