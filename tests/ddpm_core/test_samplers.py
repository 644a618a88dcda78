"""The samplers against closed forms: Gaussian data, point masses, steps by hand; and what they promise of seeds."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, noise, sample
from tests.ddpm_core.gaussian_oracle import GaussianOracle

LINEAR = NoiseSchedule.linear()
SHAPE = (1, 8, 8)


EVERY_SAMPLER: list[dict[str, Any]] = [
    {"sampler": "ancestral"},
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 0.5},
    {"sampler": "dpmpp_2m"},
    {"sampler": "dpmpp_2m", "dynamic_threshold": 0.9},
]


@pytest.mark.parametrize("settings", EVERY_SAMPLER, ids=str)
def test_an_image_depends_on_its_own_seed_alone(network: UNet, settings: dict[str, Any]) -> None:
    process = GaussianDiffusion(LINEAR)
    one = sample(process, network, SHAPE, [1, 2, 3, 2**63 + 5], steps=8, **settings)
    other = sample(process, network, SHAPE, [9, 2, 8, 7], steps=8, **settings)
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one, sample(process, network, SHAPE, [1, 2, 3, 2**63 + 5], steps=8, **settings))
    assert (one.shape, one.dtype) == ((4, 1, 8, 8), torch.float32)
    assert one.abs().max() <= 1


@pytest.mark.parametrize("clip_x0", [True, False])
@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_ddim_with_eta_1_is_ancestral_small(network: UNet, clip_x0: bool, steps: int | None, predict: str) -> None:
    process = GaussianDiffusion(NoiseSchedule.sigmoid(60), predict=predict)
    ancestral, ddim = (
        sample(process, network, SHAPE, [1, 2], steps=steps, spacing="trailing", clip_x0=clip_x0, **settings)
        for settings in ({"sampler": "ancestral"}, {"sampler": "ddim", "eta": 1.0})
    )
    torch.testing.assert_close(ddim, ancestral, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "variance", "predict"),
    [
        ({"sampler": "ancestral"}, "small", "eps"),
        ({"sampler": "ancestral"}, "large", "x0"),
        ({"sampler": "ddim"}, "small", "eps"),
        ({"sampler": "ddim", "steps": 200, "spacing": "linspace"}, "small", "v"),
        ({"sampler": "ddim", "eta": 1.0}, "small", "eps"),
        ({"sampler": "dpmpp_2m", "steps": 200, "spacing": "linspace"}, "small", "eps"),
        ({"sampler": "ancestral", "steps": 200}, "learned_range", "v"),
        ({"sampler": "ddim"}, "large", "mean"),
        ({"sampler": "dpmpp_2m"}, "small", "mean"),
    ],
)
def test_the_best_network_gives_back_mean_and_spread(settings: dict[str, Any], variance: str, predict: str) -> None:
    process = GaussianDiffusion(LINEAR, predict=predict, variance=variance)
    oracle = GaussianOracle(process, mean=0.3, std=0.2)
    x = sample(process, oracle, SHAPE, range(150), clip_x0=False, **settings)
    assert x.mean().item() == pytest.approx(0.3, abs=4 * 0.2 / x.numel() ** 0.5 + 0.002)
    assert x.std().item() == pytest.approx(0.2, rel=0.04)
    # Pixels stay independent.
    assert abs(torch.corrcoef(torch.stack((x[..., ::2].flatten(), x[..., 1::2].flatten())))[0, 1]) < 0.06


def test_steps_noise_is_keyed_by_seed_and_step() -> None:
    """Two ancestral steps by hand, noise taken from its documented place."""
    process = GaussianDiffusion(LINEAR, predict="x0")
    seen: list[Tensor] = []
    sample(
        process,
        lambda x, t: 0.5 * x,
        SHAPE,
        [7, 11],
        steps=4,
        spacing="trailing",
        callback=lambda i, t, x, x0: seen.append(x),
    )
    keys = [noise.key(7, "sample"), noise.key(11, "sample")]
    assert torch.equal(seen[0], noise.normal(keys, SHAPE, counter=0))
    respaced = process.respace(4, "trailing")
    for index in (0, 1, 2):
        t = torch.tensor([4 - index])
        mean, variance = respaced.posterior((0.5 * seen[index]).clamp(-1, 1), seen[index], t)
        expected = mean + variance.sqrt() * noise.normal(keys, SHAPE, counter=index + 1)
        torch.testing.assert_close(seen[index + 1], expected)


def test_callback_sees_the_trajectory(network: UNet) -> None:
    process = GaussianDiffusion(LINEAR)
    rows = []
    x = sample(
        process,
        network,
        SHAPE,
        [1, 2],
        sampler="ddim",
        steps=5,
        spacing="trailing",
        callback=lambda index, t, x_t, x0: rows.append((index, t, x_t, x0)),
    )
    assert [(index, t) for index, t, _, _ in rows] == [(0, 1000), (1, 800), (2, 600), (3, 400), (4, 200)]
    assert all(x_t.shape == x0.shape == x.shape and x0.abs().max() <= 1 for _, _, x_t, x0 in rows)
    torch.testing.assert_close(rows[-1][3], x)


def test_clipped_ddim_stays_consistent() -> None:
    """With x0 clipped, eps is what remains of x_t: a step keeps the noise rate of x_t's rest."""
    process = GaussianDiffusion(LINEAR)
    rows = []
    sample(
        process,
        lambda x, t: torch.zeros_like(x),  # predicts x0 = x_t / signal rate: far outside at first
        SHAPE,
        [1],
        sampler="ddim",
        steps=10,
        callback=lambda index, t, x_t, x0: rows.append((x_t, x0)),
    )
    schedule = process.schedule.respace(10)
    (x_t, x0), (x_next, _) = rows[0], rows[1]
    before, now = schedule.alpha_bar[8], schedule.alpha_bar[9]
    eps = (x_t - now.sqrt() * x0) / (1 - now).sqrt()
    assert eps.abs().max() > 0.5
    expected = before.sqrt() * x0 + (1 - before).sqrt() * eps
    torch.testing.assert_close(x_next, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_networks_mode_is_put_back_and_results_are_plain_tensors(network: UNet) -> None:
    def draw() -> Tensor:
        return sample(GaussianDiffusion(LINEAR), network, SHAPE, [1], steps=2, spacing="trailing")

    network.train()
    x = draw()
    assert network.training
    assert network.down[0].blocks[0].dropout.training
    assert not x.is_inference()
    assert not x.requires_grad
    network.eval()
    assert torch.equal(draw(), x)  # no dropout either way
    assert not network.training


@pytest.mark.parametrize("predict", ["x0", "v", "mean"])
@pytest.mark.parametrize("settings", EVERY_SAMPLER, ids=str)
def test_zero_terminal_schedules_sample(network: UNet, predict: str, settings: dict[str, Any]) -> None:
    process = GaussianDiffusion(LINEAR.rescale_zero_terminal(), predict=predict)
    for steps in (1, 2, 5):
        assert sample(process, network, SHAPE, [1], steps=steps, **settings).isfinite().all()


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
def test_zero_terminal_schedules_give_back_mean_and_spread(sampler: str) -> None:
    process = GaussianDiffusion(LINEAR.rescale_zero_terminal(), predict="v")
    x = sample(process, GaussianOracle(process, 0.3, 0.2), SHAPE, range(100), sampler=sampler, clip_x0=False)
    assert x.mean().item() == pytest.approx(0.3, abs=0.012)
    assert x.std().item() == pytest.approx(0.2, rel=0.04)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
def test_a_network_that_predicts_the_mean_samples_in_fewer_steps(sampler: str) -> None:
    process = GaussianDiffusion(LINEAR, predict="mean")
    settings: dict[str, Any] = {"sampler": sampler, "steps": 200, "spacing": "linspace", "clip_x0": False}
    x = sample(process, GaussianOracle(process, 0.3, 0.2), SHAPE, range(100), **settings)
    # Ancestral sampling with the small variance loses 7 % of the spread in so few steps, whatever is predicted.
    assert x.std().item() == pytest.approx(0.2, rel=0.1)
    other = GaussianDiffusion(LINEAR, predict="x0")
    same = sample(other, GaussianOracle(other, 0.3, 0.2), SHAPE, range(100), **settings)
    torch.testing.assert_close(x, same, rtol=0, atol=2e-3)


# The deterministic samplers against the ordinary differential equation that they solve.


def even_log_snr(steps: int) -> NoiseSchedule:
    """Equal steps of the log-SNR, from 1e-4 signal to 1e-8 noise."""
    return NoiseSchedule.from_alpha_bars(torch.linspace(18, -10, steps, dtype=torch.float64).sigmoid())


def worst_error(sampler: str, steps: int, predict: str) -> float:
    """Of any pixel at any step of the trajectory, to where the flow takes the first noise, in closed form."""
    process = GaussianDiffusion(even_log_snr(steps), predict=predict)
    oracle = GaussianOracle(process, 0.3, 0.2)
    trajectory: list[Tensor] = []
    x = sample(
        process,
        oracle,
        SHAPE,
        [1, 2],
        sampler=sampler,
        clip_x0=False,
        callback=lambda index, t, x_t, x0: trajectory.append(x_t),
    )
    trajectory.append(x)
    assert len(trajectory) == steps + 1
    flow = [oracle.flow(trajectory[0], steps, t) for t in range(steps, -1, -1)]
    return max((got - expected).abs().max().item() for got, expected in zip(trajectory, flow, strict=True))


@pytest.mark.parametrize("predict", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_samplers_order(sampler: str, order: int, predict: str) -> None:
    errors = [worst_error(sampler, steps, predict) for steps in (40, 80, 160)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.3)
    assert errors[-1] < {1: 0.05, 2: 0.003}[order]


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 3, 11])
def test_a_single_image_is_reached_exactly_in_any_steps(sampler: str, spacing: str, steps: int) -> None:
    """Data that is one image: x0 is the same all along, the flow a straight line, which both samplers follow."""
    image = torch.linspace(-0.9, 0.9, 64).view(1, *SHAPE)
    process = GaussianDiffusion(NoiseSchedule.cosine(), predict="x0")
    seen: list[tuple[int, Tensor]] = []
    x = sample(
        process,
        lambda x_t, timestep: image.expand_as(x_t),
        SHAPE,
        [1, 2],
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        callback=lambda index, t, x_t, x0: seen.append((t, x_t)),
    )
    torch.testing.assert_close(x, image.expand_as(x))
    assert len(seen) == steps
    signal, noise_rate = process.schedule.signal_rate, process.schedule.noise_rate
    wide, first = image.double(), seen[0][1].double()
    eps = (first - signal[-1] * wide) / noise_rate[-1]
    for t, x_t in seen:
        torch.testing.assert_close(x_t.double(), signal[t - 1] * wide + noise_rate[t - 1] * eps, rtol=0, atol=1e-5)


def test_two_steps_leave_dpmpp_nothing_to_extrapolate(network: UNet) -> None:
    """Its first step knows no earlier one, and its last is of first order: DDIM's."""
    process = GaussianDiffusion(LINEAR)
    for steps in (1, 2):
        ours, ddim = (sample(process, network, SHAPE, [1, 2], sampler=s, steps=steps) for s in ("dpmpp_2m", "ddim"))
        torch.testing.assert_close(ours, ddim, rtol=1e-5, atol=1e-5)
    ours, ddim = (sample(process, network, SHAPE, [1, 2], sampler=s, steps=3) for s in ("dpmpp_2m", "ddim"))
    assert (ours - ddim).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": "euler"}, "ancestral, ddim, dpmpp_2m, not 'euler'"),
        ({"eta": 0.5}, "eta belongs to the ddim sampler"),
        ({"sampler": "ddim", "eta": 1.5}, r"0\.\.1, not 1.5"),
        ({"sampler": "dpmpp_2m", "eta": 1.0}, "eta belongs to the ddim sampler, not to 'dpmpp_2m'"),
        ({"eta": float("nan")}, r"0\.\.1, not nan"),
        ({"dynamic_threshold": 0.0}, r"quantile in \(0, 1\] and needs clip_x0, not 0.0"),
        ({"dynamic_threshold": 1.1}, r"quantile in \(0, 1\]"),
        ({"dynamic_threshold": 0.9, "clip_x0": False}, "needs clip_x0"),
        ({"labels": [0]}, "no classes"),
        ({"guidance": 2.0}, "give labels"),
        ({"seeds": []}, "seeds is empty"),
        ({"steps": 1001}, r"1\.\.1000"),
        ({"steps": 0}, r"1\.\.1000"),
        ({"steps": 2.5}, "integer, not 2.5"),
        ({"steps": 10, "spacing": "odd"}, "leading, linspace, trailing, not 'odd'"),
        ({"spacing": "odd"}, "leading, linspace, trailing, not 'odd'"),
        ({"seeds": [0.5]}, "a seed must be an integer, not 0.5"),
    ],
)
def test_bad_input(network: UNet, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sample(GaussianDiffusion(LINEAR), network, SHAPE, **({"seeds": [1]} | settings))


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("settings", [{}, {"dynamic_threshold": 0.9}, {"clip_x0": False}])
@pytest.mark.parametrize("from_step", [0, 3])
def test_a_network_that_answers_nan_draws_nothing(sampler: str, settings: dict[str, Any], from_step: int) -> None:
    calls: list[int] = []

    def network(x_t: Tensor, timestep: Tensor) -> Tensor:
        calls.append(1)
        return x_t * (math.nan if len(calls) > from_step else 0.0)

    with pytest.raises(ValueError, match=r"the images hold NaN or infinities: the network, or .* diverged"):
        sample(GaussianDiffusion(LINEAR), network, SHAPE, [1], sampler=sampler, steps=4, **settings)
