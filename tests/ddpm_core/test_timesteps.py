"""Densities over timesteps and draws from them: whatever the density, weighted terms have the mean of all alike."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, losses, noise
from ddpm_core.timesteps import draw, importance, timestep_density, uniform_density, vlb_density
from tests.ddpm_core.gaussian_oracle import GaussianOracle, draw_8bit

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(100),
    "zero terminal": NoiseSchedule.linear().rescale_zero_terminal(),
    "respaced": NoiseSchedule.cosine().respace(7),
    "two steps": NoiseSchedule.cosine(2),
}
DENSITIES = [uniform_density, vlb_density]
Density = Callable[[GaussianDiffusion], Tensor]


def process_on(name: str) -> GaussianDiffusion:
    return GaussianDiffusion(SCHEDULES[name], predict="v")


@pytest.mark.parametrize("name", SCHEDULES)
def test_densities_are_densities(name: str) -> None:
    process = process_on(name)
    count = process.timesteps
    for density, length in ((uniform_density, count), (vlb_density, count), (timestep_density, count - 1)):
        q = density(process)
        assert (q.shape, q.dtype) == ((length,), torch.float64)
        assert q.sum().item() == pytest.approx(1, rel=1e-12)
        assert q.min() >= 0.1 / length * (1 - 1e-9)  # a tenth is spread evenly: no term can count a thousandfold
    assert torch.equal(uniform_density(process), torch.full((count,), 1 / count, dtype=torch.float64))


def test_a_single_timestep_has_all_the_density() -> None:
    process = GaussianDiffusion(NoiseSchedule.from_betas([0.9995]))
    assert uniform_density(process).tolist() == [1]
    assert vlb_density(process).tolist() == pytest.approx([1])
    assert draw(vlb_density(process), torch.tensor([0.0, 0.5, 0.999])).tolist() == [1, 1, 1]


def test_a_schedule_that_ends_early_has_no_decoders_part() -> None:
    """Where x_1 leaves x0 known to a small part of an 8-bit level, the decoder's entropy is none, not below none."""
    schedule = NoiseSchedule.from_alpha_bars([1 - 1e-9, 0.5, 1e-4])
    q = vlb_density(GaussianDiffusion(schedule))
    assert q[0].item() == pytest.approx(0.1 / 3)
    assert q.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("density", DENSITIES)
def test_weighted_draws_have_the_mean_of_all_timesteps_alike(name: str, density: Density) -> None:
    """By enumeration: the sum over t of q(t) w(t) f(t) is the mean of f, whatever f."""
    process = process_on(name)
    q, t = density(process), torch.arange(1, process.timesteps + 1)
    weights = importance(q, t)
    assert weights.dtype == torch.float64
    for seed in range(3):
        f = torch.randn(process.timesteps, generator=torch.Generator().manual_seed(seed)).double().exp()
        assert (q * weights * f).sum().item() == pytest.approx(f.mean().item(), rel=1e-12)
    assert torch.equal(importance(q, t.flip(0)[:2]), weights.flip(0)[:2])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("density", DENSITIES)
def test_draws_follow_the_density(name: str, density: Density) -> None:
    """Uniforms on an even grid come as often as the density says, to within one; keyed ones to within chance."""
    q = density(process_on(name))
    n = 50_000
    t = draw(q, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    assert t.dtype == torch.int64
    assert (t.diff() >= 0).all()
    counts = t.bincount(minlength=len(q) + 1)[1:]
    assert len(counts) == len(q)
    assert (counts - n * q).abs().max() <= 1
    keyed = draw(q, noise.uniform([1, 2], n // 2))
    assert keyed.shape == (2, n // 2)
    shares = keyed.flatten().bincount(minlength=len(q) + 1)[1:] / n
    assert ((shares - q).abs() < 5 * (q / n).sqrt()).all()


def test_draws_invert_the_cumulative_density() -> None:
    q = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64)
    u = torch.tensor([0.0, 0.124, 0.125, 0.624, 0.625, 0.874, 0.875, 1 - 2**-53], dtype=torch.float64)
    assert draw(q, u).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert draw(q, u.view(2, 2, 2)).shape == (2, 2, 2)
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64) * (1 - 1e-12)  # rounding: the sum ends below 1
    assert draw(thirds, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [3]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_bounds_density_makes_its_terms_vary_less(name: str) -> None:
    """On Gaussian pixels of another spread than the density reckons with, terms in closed form."""
    process = process_on(name)
    oracle = GaussianOracle(process, 0.1, 0.25)
    x0 = draw_8bit(1, (1, 8, 8), 0.1, 0.25, seed=0)
    later = [oracle.expected_term(x0, t).item() for t in range(2, process.timesteps + 1)]
    decoder = losses.vlb(process, oracle, x0, torch.tensor([1]), torch.ones_like(x0)).item()
    terms = torch.tensor([decoder, *later], dtype=torch.float64)
    t = torch.arange(1, process.timesteps + 1)

    def spread(q: Tensor) -> float:
        """Standard deviation of one weighted draw, in units of its mean."""
        second = (q * (importance(q, t) * terms) ** 2).sum()
        return (second.item() / terms.mean().item() ** 2 - 1) ** 0.5

    assert spread(vlb_density(process)) < 0.6 < 3 < spread(uniform_density(process))


def test_densities_follow_from_the_schedule_alone() -> None:
    """No history, no network: the same on every worker and at every step."""
    for density in (uniform_density, vlb_density, timestep_density):
        one = density(GaussianDiffusion(NoiseSchedule.cosine(50), "eps", "small"))
        other = density(GaussianDiffusion(NoiseSchedule.cosine(50), "v", "learned_range"))
        assert torch.equal(one, other)
