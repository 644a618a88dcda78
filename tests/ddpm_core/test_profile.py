"""What a model does at every timestep, by hand: the bound's terms, the errors, and the rate-distortion curve."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_core import GaussianDiffusion, NoiseSchedule
from ddpm_core.likelihood import profile, rate_distortion
from tests.ddpm_core.gaussian_oracle import GaussianOracle, draw_8bit, even_log_snr

MEAN, STD = 0.1, 0.25


@pytest.fixture(scope="module")
def process() -> GaussianDiffusion:
    return GaussianDiffusion(NoiseSchedule.linear())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return draw_8bit(48, (1, 12, 12), MEAN, STD, seed=0)


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
@pytest.mark.parametrize(("clip_x0", "taken"), [(True, 1.0), (False, 1.5)])
def test_the_terms_of_a_network_by_hand(images: torch.Tensor, variance: str, clip_x0: bool, taken: float) -> None:
    """From the x_t that the network was shown, by Bayes' rule in precisions, and by differences of CDFs."""
    schedule, choice, shown = even_log_snr(6, first=4.0), 0.3, []

    def network(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        shown.append(x_t.double())
        answer = torch.full_like(x_t, 1.5)
        return torch.cat((answer, torch.full_like(x_t, choice)), dim=1) if variance == "learned_range" else answer

    process = GaussianDiffusion(schedule, "x0", variance)
    got = profile(process, network, images, seed=4, clip_x0=clip_x0)
    assert got.x0_mse.shape == got.eps_mse.shape == (48, 6)
    assert got.x0_mse.dtype == got.eps_mse.dtype == torch.float64
    assert not any(values.is_inference() for values in (got.x0_mse, got.eps_mse, *got.bits))
    x0, guess = images.double(), torch.full_like(images, taken).double()
    bar = [1.0, *schedule.alpha_bar.tolist()]
    small: dict[int, float] = {}
    for t in reversed(range(1, 7)):
        x_t, alpha = shown[t - 1], bar[t] / bar[t - 1]

        def gaussian(image: torch.Tensor, x_t: torch.Tensor = x_t, alpha: float = alpha, t: int = t) -> Normal:
            precision = alpha / (1 - alpha) + 1 / (1 - bar[t - 1])
            mean = (alpha**0.5 / (1 - alpha) * x_t + bar[t - 1] ** 0.5 / (1 - bar[t - 1]) * image) / precision
            return Normal(mean, precision**-0.5)

        if t > 1:
            small[t] = gaussian(x0).stddev.flatten()[0].item() ** 2
        low, high = small[max(t, 2)], (1 - alpha if t > 1 else small[2])
        if variance == "learned_range":
            share, high = (1 + choice) / 2, 1 - alpha
            sigma = math.exp(share * math.log(high) + (1 - share) * math.log(low)) ** 0.5
        else:
            sigma = (low if variance == "small" else high) ** 0.5
        if t > 1:
            nats = kl_divergence(gaussian(x0), Normal(gaussian(guess).mean, sigma))
        else:  # x_0 is the guess itself
            level, edges = (x0 + 1) * 127.5, [(x0 + side / 255 - guess) / (sigma * 2**0.5) for side in (-1, 1)]
            below, upto = (torch.special.erfc(-edge) / 2 for edge in edges)  # keeps its digits far below
            nats = -(torch.where(level > 254.5, 1.0, upto) - torch.where(level < 0.5, 0.0, below)).log()
        expected = nats.mean((1, 2, 3)) / math.log(2)
        torch.testing.assert_close(got.bits.terms[:, t - 1], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got.bits.total, got.bits.prior + got.bits.terms.sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("answer", "clip_x0", "taken"), [(0.25, True, 0.25), (3.0, True, 1.0), (3.0, False, 3.0)])
def test_errors_of_a_network_that_always_sees_the_same_image(
    process: GaussianDiffusion, images: torch.Tensor, answer: float, clip_x0: bool, taken: float
) -> None:
    """x0 is missed by the same at every t, and eps, which makes up for it in x_t, by SNR times as much."""
    schedule = process.schedule.respace(12)
    network = GaussianDiffusion(schedule, predict="x0")
    got = profile(network, lambda x, t: torch.full_like(x, answer), images, 0, clip_x0)
    x0_mse = (taken - images.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(got.x0_mse, x0_mse[:, None].expand(48, 12))
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    torch.testing.assert_close(got.eps_mse, x0_mse[:, None] * snr, rtol=1e-4, atol=0)


@pytest.mark.parametrize("clip_x0", [True, False])
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_errors_of_a_network_that_sees_no_noise(images: torch.Tensor, clip_x0: bool) -> None:
    """eps is taken for 0, and so x0 for x_t over its signal rate: by hand from the x_t that the network was shown."""
    schedule = even_log_snr(5, last=-3.0)
    shown = []

    def network(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        shown.append(x_t)
        return torch.zeros_like(x_t)

    got = profile(GaussianDiffusion(schedule), network, images, 0, clip_x0)
    assert len(shown) == 5
    for t, x_t in enumerate(shown, start=1):
        signal, noise = schedule.signal_rate[t - 1].item(), schedule.noise_rate[t - 1].item()
        x_t, x0 = x_t.double(), images.double()
        eps, guess = (x_t - signal * x0) / noise, x_t / signal
        rest = torch.zeros_like(x_t)
        if clip_x0:
            guess = guess.clamp(-1, 1)
            rest = (x_t - signal * guess) / noise
        torch.testing.assert_close(got.x0_mse[:, t - 1], (guess - x0).square().mean((1, 2, 3)), rtol=1e-5, atol=0)
        torch.testing.assert_close(got.eps_mse[:, t - 1], (rest - eps).square().mean((1, 2, 3)), rtol=1e-5, atol=0)
        if not clip_x0:
            assert got.eps_mse[:, t - 1].mean().item() == pytest.approx(1, abs=0.1)  # all of the noise


def test_the_best_networks_errors_are_those_in_closed_form(process: GaussianDiffusion, images: torch.Tensor) -> None:
    """What remains of Gaussian pixels' variance once x_t is known: 1 / (1 / s^2 + SNR)."""
    oracle = GaussianOracle(process, MEAN, STD)
    respaced = process.respace(25)
    got = profile(respaced, oracle, images, 0, clip_x0=False)
    snr = respaced.schedule.log_snr.exp()
    expected = 1 / (1 / STD**2 + snr)
    torch.testing.assert_close(got.x0_mse.mean(0), expected, rtol=0.1, atol=0)
    torch.testing.assert_close(got.eps_mse.mean(0), expected * snr, rtol=0.1, atol=0)


def test_the_rate_distortion_curve(images: torch.Tensor) -> None:
    process = GaussianDiffusion(NoiseSchedule.cosine(30), "v")
    got = profile(process, GaussianOracle(process, MEAN, STD), images, seed=0)
    curve = rate_distortion(got)
    assert curve.rate.shape == curve.distortion.shape == (30,)
    bits = got.bits
    for t in range(1, 31):
        # To have x_t the receiver was sent the prior's part and the steps T..t+1, whose terms are L_{T-1}..L_t.
        sent = sum(bits.terms[:, step - 1].mean().item() for step in range(t + 1, 31)) + bits.prior.mean().item()
        assert curve.rate[t - 1].item() == pytest.approx(sent, rel=1e-9)
        # One unit of [-1, 1] is 127.5 of the levels 0..255.
        levels = math.sqrt(got.x0_mse[:, t - 1].mean().item() * 127.5**2)
        assert curve.distortion[t - 1].item() == pytest.approx(levels, rel=1e-9)
    assert curve.rate[-1].item() == pytest.approx(bits.prior.mean().item(), rel=1e-9)
    assert (curve.rate.diff() < 0).all()
    assert (curve.distortion.diff() > -0.1).all()  # 6,912 pixels: chance shows where it hardly rises
    whole = curve.rate[0] + bits.terms[:, 0].mean()
    assert whole.item() == pytest.approx(bits.total.mean().item(), rel=1e-12)
    # Knowing nothing, the best guess is off by the data's spread.
    assert curve.distortion[-1].item() == pytest.approx(127.5 * STD, rel=0.05)
    assert curve.distortion[0] < 9


def test_distortion_is_in_8_bit_levels() -> None:
    """A network that is off by exactly three levels."""
    process = GaussianDiffusion(NoiseSchedule.cosine(4), "x0")
    levels = torch.arange(64).view(1, 1, 8, 8) * 3.0
    images = levels / 127.5 - 1
    curve = rate_distortion(profile(process, lambda x, t: (levels + 3) / 127.5 - 1, images, 0))
    assert curve.distortion.tolist() == pytest.approx([3] * 4, rel=1e-5)
