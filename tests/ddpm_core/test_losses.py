import math

import pytest
import torch

from ddpm_core import GaussianDiffusion, NoiseSchedule, losses

GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.123, 0.999])
@pytest.mark.parametrize("std", [1e-3, 7e-3, 0.1, 2.0])
def test_the_256_levels_share_all_probability(mean: float, std: float) -> None:
    nll = losses.decoder_nll(GRID, torch.full_like(GRID, mean), torch.full_like(GRID, std**2))
    assert (-nll).exp().sum().item() == pytest.approx(1, rel=1e-9)


def test_decoder_is_the_integral_of_the_density() -> None:
    for x0, mean, std in [(GRID[100], -0.2, 0.01), (GRID[3], -0.9, 0.05), (GRID[200], 0.6, 0.3)]:
        points = torch.linspace(x0 - 1 / 255, x0 + 1 / 255, 20_001, dtype=torch.float64)
        density = torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(std).double()).log_prob(points)
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
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a[0], b[0].sqrt()), normal(a[1], b[1].sqrt()))
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
            normal = torch.distributions.Normal
            kl = torch.distributions.kl_divergence(
                normal(mean, small.sqrt()), normal(model_mean, schedule.beta[t[i] - 1].sqrt())
            )
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
    normal = torch.distributions.Normal
    q = normal(x0 * process.schedule.signal_rate[-1], process.schedule.noise_rate[-1])
    expected = torch.distributions.kl_divergence(q, normal(0.0, 1.0)).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(losses.prior_term(process, x0), expected, rtol=1e-6, atol=0)
    zero = GaussianDiffusion(NoiseSchedule.linear().rescale_zero_terminal(), predict="v")
    assert losses.prior_term(zero, x0).tolist() == [0, 0, 0]
