"""What samplers may be asked for: a learned variance, dynamic thresholding, half precision."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, sample
from tests.ddpm_core.gaussian_oracle import GaussianOracle

LINEAR = NoiseSchedule.linear()
SHAPE = (1, 8, 8)


# A learned variance.


def with_choice(model: UNet, choice: float) -> Any:
    """The network with a second half of channels that is `choice` everywhere."""

    def answer(x_t: Tensor, timestep: Tensor) -> Tensor:
        output = model(x_t, timestep)
        return torch.cat((output, torch.full_like(output, choice)), dim=1)

    return answer


@pytest.mark.parametrize(("choice", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_a_learned_variance_at_its_ends_is_the_fixed_one(network: UNet, choice: float, variance: str) -> None:
    fixed = sample(GaussianDiffusion(LINEAR, "v", variance), network.eval(), SHAPE, [1, 2], steps=9)
    process = GaussianDiffusion(LINEAR, "v", "learned_range")
    learned = sample(process, with_choice(network, choice), SHAPE, [1, 2], steps=9)
    torch.testing.assert_close(learned, fixed, rtol=1e-4, atol=1e-4)
    other = sample(process, with_choice(network, -choice), SHAPE, [1, 2], steps=9)
    assert (other - fixed).abs().max() > 0.01


@pytest.mark.parametrize("settings", [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "dpmpp_2m"}])
def test_other_samplers_do_not_use_a_learned_variance(network: UNet, settings: dict[str, Any]) -> None:
    fixed = sample(GaussianDiffusion(LINEAR, "v"), network.eval(), SHAPE, [1, 2], steps=5, **settings)
    process = GaussianDiffusion(LINEAR, "v", "learned_range")
    assert torch.equal(sample(process, with_choice(network, 0.7), SHAPE, [1, 2], steps=5, **settings), fixed)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_with_the_exact_variance_few_steps_keep_the_spread(predict: str) -> None:
    """Gaussian data's reverse steps are Gaussian: mean and variance of x_{t-1} given x_t, however long the step. The
    spread of x_1 is then that of the data noised once, between those that the fixed variances come to.
    """
    schedule = NoiseSchedule.from_alpha_bars(torch.linspace(7, -9, 6, dtype=torch.float64).sigmoid())
    stds = {}
    for variance in ("small", "learned_range", "large"):
        process = GaussianDiffusion(schedule, predict, variance)
        oracle = GaussianOracle(process, 0.3, 0.2)
        seen: list[Tensor] = []
        sample(
            process,
            oracle,
            SHAPE,
            range(300),
            clip_x0=False,
            callback=lambda index, t, x_t, x0, seen=seen: seen.append(x_t),
        )
        assert seen[-1].mean().item() == pytest.approx(0.3 * schedule.signal_rate[0].item(), abs=0.01)
        stds[variance] = [x_t.std().item() for x_t in seen]
    exact = [math.sqrt(oracle.variance(t)) for t in range(6, 0, -1)]
    # 19,200 pixels: a standard error of 0.5 %.
    assert stds["learned_range"] == pytest.approx(exact, rel=0.02)
    assert stds["small"][-1] < 0.93 * exact[-1]
    assert stds["large"][-1] > 1.25 * exact[-1]


# Dynamic thresholding.


def given_back(x0: Tensor, **settings: Any) -> Tensor:
    """What one step makes of a network that takes every noise for x0 [N, C, H, W]."""
    process = GaussianDiffusion(LINEAR, predict="x0")
    return sample(process, lambda x, t: x0, x0.shape[1:], range(len(x0)), steps=1, **settings)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
def test_dynamic_thresholding_by_hand(sampler: str) -> None:
    """Absolute values 0, 0.1, ..., 2.0 in the first image: their 0.9-quantile is 1.8, which becomes 1. The second
    stays within [-1, 1] but for one pixel: below a limit of 1 it is plain clipping.
    """
    wide = torch.arange(21) / 10 * torch.tensor([1, -1]).repeat(11)[:21]
    narrow = torch.linspace(-0.9, 0.9, 21)
    narrow[20] = 5
    x0 = torch.stack((wide, narrow)).view(2, 1, 3, 7)
    got = given_back(x0, sampler=sampler, dynamic_threshold=0.9).flatten(1)
    expected = [max(-1.8, min(1.8, value)) / 1.8 for value in wide.tolist()]
    assert got[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert got[1].tolist() == pytest.approx([*narrow[:20].tolist(), 1], abs=1e-6)
    # All values count: the largest becomes 1. Between two of them the quantile is in between.
    assert given_back(x0, dynamic_threshold=1.0).flatten(1)[0].tolist() == pytest.approx((wide / 2).tolist(), abs=1e-6)
    between = given_back(x0, dynamic_threshold=0.925).flatten(1)[0]
    assert between[18].item() == pytest.approx(1.8 / 1.85, abs=1e-5)
    plain = given_back(x0)
    assert torch.equal(plain, x0.clamp(-1, 1))


def test_dynamic_thresholding_takes_all_channels_of_an_image_together() -> None:
    x0 = torch.zeros(1, 2, 2, 2)
    x0[0, 0] = 4
    x0[0, 1] = torch.tensor([[0.5, -0.5], [1.0, -3.0]])
    got = given_back(x0, dynamic_threshold=1.0)
    torch.testing.assert_close(got, x0 / 4)


def test_the_threshold_reaches_every_step(network: UNet) -> None:
    process = GaussianDiffusion(LINEAR)
    limits = []
    for quantile in (None, 0.5):
        rows: list[Tensor] = []
        sample(
            process,
            network,
            SHAPE,
            [1, 2],
            steps=4,
            dynamic_threshold=quantile,
            callback=lambda index, t, x_t, x0, rows=rows: rows.append(x0),
        )
        limits.append([x0.abs().amax().item() for x0 in rows])
        edges = [(x0.abs() == 1).double().mean().item() for x0 in rows]
        assert quantile is None or edges[0] >= 0.5  # half of the pixels lie at the limit, where predictions are wild
    assert all(limit <= 1 for each in limits for limit in each)


def test_a_network_in_half_precision(network: UNet) -> None:
    """Images stay float32, whatever the network answers in."""
    process = GaussianDiffusion(LINEAR, "v")

    def half(x_t: Tensor, timestep: Tensor) -> Tensor:
        return network(x_t, timestep).bfloat16()

    whole = sample(process, network.eval(), SHAPE, [1, 2], sampler="ddim", steps=5)
    got = sample(process, half, SHAPE, [1, 2], sampler="ddim", steps=5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, whole, rtol=0, atol=0.05)
