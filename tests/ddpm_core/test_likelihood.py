"""Bits per dimension against closed forms for Gaussian data, and what is derived from them against brute force."""

import math
import statistics

import pytest
import torch

from ddpm_core import (
    GaussianDiffusion,
    NoiseSchedule,
    UNet,
    UNetConfig,
    bits_per_dim,
    bits_per_dim_estimate,
    content_keys,
    mean_interval,
)
from ddpm_core.guidance import Conditioned
from ddpm_core.likelihood import BitsPerDim, _stratified, timestep_density
from tests.ddpm_core.gaussian_oracle import GaussianOracle, draw_8bit, even_log_snr

MEAN, STD = 0.1, 0.25


@pytest.fixture(scope="module")
def process() -> GaussianDiffusion:
    return GaussianDiffusion(NoiseSchedule.linear())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return draw_8bit(48, (1, 12, 12), MEAN, STD, seed=0)


@pytest.fixture(scope="module")
def exact(process: GaussianDiffusion, images: torch.Tensor) -> BitsPerDim:
    return bits_per_dim(process, GaussianOracle(process, MEAN, STD), images, seed=1, clip_x0=False)


def test_terms_are_those_in_closed_form(process: GaussianDiffusion, images: torch.Tensor, exact: BitsPerDim) -> None:
    assert exact.terms.shape == (48, 1000)
    assert exact.total.dtype == torch.float64
    torch.testing.assert_close(exact.total, exact.prior + exact.terms.sum(1))
    oracle = GaussianOracle(process, MEAN, STD)
    expected = torch.stack([oracle.expected_term(images, t) for t in range(2, 1001)], dim=1)
    # 6,912 squared normals a term: a standard error of 1.7 %.
    torch.testing.assert_close(exact.terms[:, 1:].mean(0), expected.mean(0), rtol=0.08, atol=0)
    assert exact.terms[:, 1:].sum(1).mean().item() == pytest.approx(expected.sum(1).mean().item(), rel=2e-3)


def test_the_bound_of_the_best_network_is_just_above_the_truth(images: torch.Tensor) -> None:
    """A reverse process that undid the forward one exactly would spend KL(q(x_1 | x_0) || p(x_1)) on all terms but
    the decoder's. Where steps are small and the density broad, the large variance comes close to that.
    """
    log_snr = torch.linspace(9, -12, 400, dtype=torch.float64)
    process = GaussianDiffusion(NoiseSchedule.from_alpha_bars(log_snr.sigmoid()), predict="x0", variance="large")
    oracle = GaussianOracle(process, MEAN, STD)
    bits = bits_per_dim(process, oracle, images, seed=2, clip_x0=False)
    signal, noise = process.schedule.signal_rate[0], process.schedule.noise_rate[0]
    q = torch.distributions.Normal(signal * images.double(), noise)
    p = torch.distributions.Normal(signal * MEAN, (signal**2 * STD**2 + noise**2).sqrt())
    truth = torch.distributions.kl_divergence(q, p).mean().item() / math.log(2)
    assert truth < (bits.total - bits.terms[:, 0]).mean().item() < truth + 0.05
    # As a code for the pixels, the whole bound cannot beat their entropy.
    assert bits.total.mean().item() > oracle.true_bits(images).mean().item()


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [3, 8])
def test_with_the_exact_variance_the_bound_loses_nothing_in_few_steps(predict: str, steps: int) -> None:
    """Mean and variance of x_{t-1} given x_t make the reverse process that which undoes the forward one. All terms but
    the decoder's then sum to KL(q(x_1 | x_0) || q(x_1)) (the chain rule of KL over x_1..x_T), whatever the steps; a
    fixed variance costs more.
    """
    images, schedule = draw_8bit(300, (1, 12, 12), MEAN, STD, seed=0), even_log_snr(steps)
    signal, noise = schedule.signal_rate[0], schedule.noise_rate[0]
    q = torch.distributions.Normal(signal * images.double(), noise)
    p = torch.distributions.Normal(signal * MEAN, (signal**2 * STD**2 + noise**2).sqrt())
    truth = torch.distributions.kl_divergence(q, p).mean().item() / math.log(2)

    def spent(variance: str) -> float:
        process = GaussianDiffusion(schedule, predict, variance)
        bits = bits_per_dim(process, GaussianOracle(process, MEAN, STD), images, seed=2, clip_x0=False)
        return (bits.total - bits.terms[:, 0]).mean().item()

    # 43,200 pixels, each term's noise worth about a bit: a standard error of 0.005.
    assert spent("learned_range") == pytest.approx(truth, abs=0.02)
    assert min(spent("small"), spent("large")) > truth + 0.1


def test_a_worse_network_has_more_bits(process: GaussianDiffusion, images: torch.Tensor, exact: BitsPerDim) -> None:
    worse = bits_per_dim_estimate(process, GaussianOracle(process, -0.2, 0.1), images, 1, 20, clip_x0=False)
    assert worse.mean() > exact.total.mean() + 0.1


@pytest.mark.parametrize("count", [2, 5, 12])
def test_estimates_mean_is_the_exact_value(
    process: GaussianDiffusion, images: torch.Tensor, exact: BitsPerDim, count: int
) -> None:
    oracle = GaussianOracle(process, MEAN, STD)
    runs = torch.stack(
        [bits_per_dim_estimate(process, oracle, images, seed, count, clip_x0=False) for seed in range(60)]
    )
    error = runs.mean(1) - exact.total.mean()
    assert abs(error.mean()) < 4 * error.std() / 60**0.5 + 2e-3  # 2e-3: the exact value's own draw of noise
    assert error.std() < {2: 0.4, 5: 0.1, 12: 0.04}[count]


def test_estimate_of_a_network_that_knows_nothing_is_unbiased_too() -> None:
    process = GaussianDiffusion(NoiseSchedule.cosine(30), predict="v", variance="large")
    model = UNet(UNetConfig(channels=(8,), groups=4))
    images = draw_8bit(4, (1, 4, 4), 0.0, 0.5, seed=3)
    exact = torch.stack([bits_per_dim(process, model, images, seed).total for seed in range(8)])
    runs = torch.stack([bits_per_dim_estimate(process, model, images, seed, 6) for seed in range(80)])
    error = (runs.mean(0) - exact.mean(0)).abs()
    assert (error < 4 * (runs.var(0) / 80 + exact.var(0) / 8).sqrt()).all()


@pytest.mark.parametrize(("predict", "variance"), [("mean", "small"), ("mean", "large"), ("v", "learned_range")])
def test_the_estimate_agrees_for_every_kind_of_process(images: torch.Tensor, predict: str, variance: str) -> None:
    process = GaussianDiffusion(NoiseSchedule.cosine(40), predict, variance)
    oracle = GaussianOracle(process, MEAN, STD)
    exact = torch.stack([bits_per_dim(process, oracle, images, seed).total for seed in range(4)]).mean(1)
    runs = torch.stack([bits_per_dim_estimate(process, oracle, images, seed, 6) for seed in range(40)]).mean(1)
    error = math.sqrt(exact.var().item() / 4 + runs.var().item() / 40)
    assert runs.mean().item() == pytest.approx(exact.mean().item(), abs=4 * error)
    assert error < 0.02


def test_each_stratum_gives_one_timestep_and_all_together_the_density() -> None:
    density = timestep_density(GaussianDiffusion(NoiseSchedule.cosine(9)))
    assert density.shape == (8,)
    assert density.sum().item() == pytest.approx(1)
    assert density.min() > 0
    drawn = _stratified(density, 0, range(20_000), 3)
    assert drawn.shape == (20_000, 3)
    assert (drawn.diff(dim=1) >= 0).all()
    share = drawn.flatten().bincount(minlength=10)[2:] / drawn.numel()
    torch.testing.assert_close(share.double(), density, rtol=0, atol=4 * (0.25 / drawn.numel()) ** 0.5)
    cut = (density.cumsum(0)[None] < torch.tensor([[1 / 3], [2 / 3]]).double()).sum(1) + 2
    assert drawn[:, 0].max() <= cut[0]
    assert drawn[:, 2].min() >= cut[1]


def test_order_and_batching_do_not_matter(process: GaussianDiffusion, images: torch.Tensor) -> None:
    oracle = GaussianOracle(process, MEAN, STD)

    def estimate(x: torch.Tensor) -> torch.Tensor:
        return bits_per_dim_estimate(process, oracle, x, 5, 4)

    whole = estimate(images)
    torch.testing.assert_close(estimate(images.flip(0)), whole.flip(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([estimate(x) for x in images.split(7)]), whole, rtol=1e-12, atol=0)
    assert not torch.equal(bits_per_dim_estimate(process, oracle, images, 6, 4), whole)
    given = bits_per_dim_estimate(process, oracle, images, 5, 4, content_keys=content_keys(images))
    assert torch.equal(given, whole)
    one = bits_per_dim(process.respace(5, "trailing"), oracle, images[:1], 5).terms
    torch.testing.assert_close(bits_per_dim(process.respace(5, "trailing"), oracle, images, 5).terms[:1], one)


def test_content_keys_follow_the_pixels() -> None:
    x = draw_8bit(3, (1, 4, 4), 0.0, 0.5, seed=0)
    keys = content_keys(x)
    assert len(set(keys)) == 3
    assert content_keys(x.double() * 0.9999) == keys
    changed = x.clone()
    changed[1, 0, 2, 2] += 2 / 255 if changed[1, 0, 2, 2] < 0 else -2 / 255
    assert [a == b for a, b in zip(content_keys(changed), keys, strict=True)] == [True, False, True]
    assert content_keys(x.view(3, 1, 2, 8)) != keys


def test_interval() -> None:
    values = torch.tensor([1.0, 4.0, 2.0, 7.0])
    mean, low, high = mean_interval(values)
    half = 1.96 * statistics.stdev([1, 4, 2, 7]) / 2
    assert (mean, low, high) == (3.5, pytest.approx(3.5 - half), pytest.approx(3.5 + half))
    many = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1e6
    assert mean_interval(many) == mean_interval(many.flip(0))
    with pytest.raises(ValueError, match="two images"):
        mean_interval(values[:1])


def test_equal_images_widen_the_interval() -> None:
    """They have the same noise, so that a copy says nothing new: as if each was there once, whatever the copies."""
    values = torch.tensor([1.0, 4.0, 2.0, 7.0])
    once = mean_interval(values)
    assert mean_interval(values, content_keys=[5, 6, 7, 8]) == once
    twice = mean_interval(values.repeat(2), content_keys=[5, 6, 7, 8] * 2)
    assert twice == pytest.approx(once)
    assert mean_interval(values.repeat(2)).high < twice.high
    with pytest.raises(ValueError, match="two images or more, not 1"):
        mean_interval(values, content_keys=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="one content key"):
        mean_interval(values, content_keys=[1])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            mean_interval(torch.tensor([1.0, bad]))


def test_networks_are_evaluated_without_dropout(network: UNet) -> None:
    """The network of the fixture drops half of what it has while training; through a wrapper for labels too."""
    process = GaussianDiffusion(NoiseSchedule.cosine(5), "v")
    images = draw_8bit(3, (1, 4, 4), 0.0, 0.5, seed=3)
    classes = UNet(UNetConfig(channels=(8,), groups=4, dropout=0.5, num_classes=2))
    with torch.no_grad():
        for parameter in classes.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    labelled = Conditioned(classes, torch.tensor([0, 1, 1]))
    for model, inner in ((network, network), (labelled, classes)):
        for measure in (
            lambda model=model: bits_per_dim(process, model, images, 0).total,
            lambda model=model: bits_per_dim_estimate(process, model, images, 0, 4),
        ):
            still, training = (inner.train(mode) and measure() for mode in (False, True))
            assert torch.equal(training, still)
            assert inner.training


def test_one_timestep_is_decoder_and_prior_alone() -> None:
    process = GaussianDiffusion(NoiseSchedule.from_betas([0.9995]), predict="x0")
    x = draw_8bit(2, (1, 4, 4), 0.0, 0.5, seed=0)
    exact = bits_per_dim(process, lambda x, t: torch.zeros_like(x), x, 0)
    assert exact.terms.shape == (2, 1)
    estimate = bits_per_dim_estimate(process, lambda x, t: torch.zeros_like(x), x, 0, 1)
    torch.testing.assert_close(estimate, exact.total)  # x0 is 0 whatever the noise


def test_bad_input(process: GaussianDiffusion, images: torch.Tensor) -> None:
    oracle = GaussianOracle(process, MEAN, STD)
    for count in (1, 1001):
        with pytest.raises(ValueError, match=r"2\.\.1000"):
            bits_per_dim_estimate(process, oracle, images, 0, count)
    with pytest.raises(ValueError, match="48 images"):
        bits_per_dim_estimate(process, oracle, images, 0, 4, content_keys=[1])
    for bad in (images * 300, images * float("nan")):
        with pytest.raises(ValueError, match=r"\[-1, 1\]"):
            bits_per_dim(process, oracle, bad, 0)
