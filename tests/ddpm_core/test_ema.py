import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from scipy import integrate

from ddpm_core import Ema, ema_decay
from ddpm_core.ema import (
    PowerEma,
    combine,
    gamma_of,
    post_hoc_coefficients,
    post_hoc_error,
    power_decay,
    sigma_rel_of,
)

WIDTHS = [0.01, 0.05, 0.07, 0.1, 0.2, 1 / math.sqrt(12)]


def profile(t: float, sigma_rel: float) -> Callable[[float], float]:
    """The continuous profile, from the paper's definition."""
    gamma = gamma_of(sigma_rel)
    return lambda tau: (gamma + 1) / t * (tau / t) ** gamma if tau <= t else 0.0


def impulse_weights(sigma_rel: float, clock: list[int]) -> torch.Tensor:
    """What each value counts for in the end, the first entry the initial one: the average of unit impulses."""
    impulses = torch.eye(len(clock))
    ema = PowerEma([impulses[0]], sigma_rel)
    for impulse, (before, seen) in zip(impulses[1:], pairwise(clock), strict=True):
        ema.update([impulse], seen, seen - before)
    return ema.tensors[0].double()


def test_average_is_the_brute_force_sum() -> None:
    """The average is a weighted sum of all values seen, the weights products of decays: added up one by one."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 5, generator=generator) for _ in range(40)]
    ema = Ema([values[0][0], values[0][1]], half_life=700, ramp_up=0.1)
    for step, value in enumerate(values[1:], start=1):
        ema.update([value[0], value[1]], images_seen=64 * step, batch=64)
    decays = [0.5 ** (64 / min(700, 0.1 * 64 * step)) for step in range(1, 40)]
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for i, value in enumerate(values):
        weight = 1.0 if i == 0 else 1 - decays[i - 1]
        for decay in decays[i:]:
            weight *= decay
        expected += weight * value.double()
    torch.testing.assert_close(torch.stack(ema.tensors).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [10, 50, 250])
def test_half_life_is_in_images_whatever_the_batch(batch: int) -> None:
    ema = Ema([torch.zeros(1)], half_life=1000, ramp_up=None)
    for seen in range(batch, 1001, batch):
        ema.update([torch.ones(1)], seen, batch)
    assert ema.tensors[0].item() == pytest.approx(0.5, rel=1e-4)


def test_a_short_run_keeps_nothing_of_its_first_weights() -> None:
    ramped, plain = (Ema([torch.ones(1)], half_life=500_000, ramp_up=r) for r in (0.05, None))
    for step in range(1, 21):
        for ema in (ramped, plain):
            ema.update([torch.zeros(1)], 128 * step, 128)
    assert ramped.tensors[0].item() < 1e-12
    assert plain.tensors[0].item() > 0.99


def test_ramp_up_ends_where_the_half_life_is_reached() -> None:
    assert ema_decay(1000, 10, half_life=100, ramp_up=0.05) == 0.5 ** (10 / 50)
    assert ema_decay(2000, 10, half_life=100, ramp_up=0.05) == 0.5 ** (10 / 100)
    assert ema_decay(10**9, 10, half_life=100, ramp_up=0.05) == 0.5 ** (10 / 100)
    assert ema_decay(10, 10, half_life=0) == 0


def test_update_is_in_place_and_leaves_the_weights_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    ema = Ema([weight], half_life=100)
    place = ema.tensors[0].data_ptr()
    with torch.no_grad():
        weight.fill_(2)
    ema.update([weight], 10, 10)
    assert ema.tensors[0].data_ptr() == place
    assert not ema.tensors[0].requires_grad
    assert weight.tolist() == [2, 2, 2]
    assert ema.tensors[0].tolist() == pytest.approx([2, 2, 2], rel=1e-5)


def test_bad_input() -> None:
    for half_life in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"half_life {half_life}"):
            Ema([torch.ones(1)], half_life=half_life)
    for ramp_up in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"ramp_up must be .*, not {ramp_up}"):
            Ema([torch.ones(1)], 10, ramp_up)
    with pytest.raises(ValueError, match="float32"):
        Ema([torch.ones(1, dtype=torch.bfloat16)], half_life=1)
    with pytest.raises(ValueError, match="images_seen 5, batch 10"):
        ema_decay(5, 10, 100)
    with pytest.raises(ValueError, match="shorter"):
        Ema([torch.ones(1)], half_life=1).update([], 1, 1)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_sigma_rel_is_the_relative_deviation_of_the_profile(sigma_rel: float) -> None:
    p = profile(7.0, sigma_rel)
    mass, mean, square = (integrate.quad(lambda tau, k=k: p(tau) * tau**k, 0, 7, epsabs=0)[0] for k in range(3))
    assert mass == pytest.approx(1, rel=1e-9)
    assert math.sqrt(square - mean**2) / 7 == pytest.approx(sigma_rel, rel=1e-6)
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-14)


def test_gamma_as_published() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=5e-3)
    assert [gamma_of(sigma_rel_of(gamma)) for gamma in (0.0, 0.5, 1e4)] == pytest.approx([0, 0.5, 1e4], abs=1e-12)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
@pytest.mark.parametrize("batches", [[64] * 200, [16, 64, 32, 128] * 50], ids=["even", "uneven"])
def test_impulses_come_out_with_the_profile(sigma_rel: float, batches: list[int]) -> None:
    """Each batch's weights count with the integral of the profile over its time; the initial ones with nothing."""
    clock = [0, *torch.tensor(batches).cumsum(0).tolist()]
    weights = impulse_weights(sigma_rel, clock)
    p = profile(clock[-1], sigma_rel)
    expected = [integrate.quad(p, a, b)[0] for a, b in pairwise(clock)]
    torch.testing.assert_close(weights[1:], torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-9)
    assert weights[0] == 0
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_width_of_the_tracked_average_is_the_one_asked_for(sigma_rel: float) -> None:
    weights = impulse_weights(sigma_rel, list(range(1001)))[1:]
    steps = torch.arange(1, 1001, dtype=torch.float64)
    mean = (weights * steps).sum()
    deviation = (weights * (steps - mean) ** 2).sum().sqrt() / 1000
    assert deviation.item() == pytest.approx(sigma_rel, rel=0.01)


def test_first_update_replaces_the_initial_weights() -> None:
    ema = PowerEma([torch.full((2,), 1e30)], 0.1)
    ema.update([torch.tensor([1.0, 2.0])], 64, 64)
    assert ema.tensors[0].tolist() == [1, 2]
    assert power_decay(64, 64, 3) == 0
    assert power_decay(128, 64, 3) == 0.5**4
    assert power_decay(30, 10, 0) == pytest.approx(2 / 3)  # gamma 0: the plain mean


def test_coefficients_are_the_best_on_a_grid() -> None:
    """Constrained least squares with the profiles sampled on a fine grid, the constraint eliminated."""
    stored = [(images, sigma_rel) for images in (300, 600, 1000, 1200) for sigma_rel in (0.05, 0.1)]
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (1200 / 200_000)

    def sampled(t: float, sigma_rel: float) -> torch.Tensor:
        return torch.where(grid <= t, (gamma_of(sigma_rel) + 1) / t * (grid / t) ** gamma_of(sigma_rel), 0)

    columns = torch.stack([sampled(*snapshot) for snapshot in stored], dim=1)
    for images, sigma_rel in [(1200, 0.07), (1000, 0.12), (900, 0.1), (1200, 0.03), (1000, 0.25)]:
        target = sampled(images, sigma_rel)
        rest = torch.linalg.lstsq(columns[:, 1:] - columns[:, :1], (target - columns[:, 0]).unsqueeze(1)).solution[:, 0]
        expected = torch.cat(((1 - rest.sum()).unsqueeze(0), rest))
        coefficients = post_hoc_coefficients(stored, images, sigma_rel)
        assert coefficients.dtype == torch.float64
        torch.testing.assert_close(coefficients, expected, rtol=2e-3, atol=2e-3)
        distance = (columns @ coefficients - target).norm() / target.norm()
        error = post_hoc_error(stored, coefficients, images, sigma_rel)
        assert error == pytest.approx(distance.item(), rel=2e-3)
        assert error <= post_hoc_error(stored, expected, images, sigma_rel) * (1 + 1e-9)


def test_an_average_that_was_not_tracked_is_rebuilt() -> None:
    """Weights on a random walk, tracked at 0.05 and 0.1 and stored now and then: other widths, from the snapshots."""
    generator = torch.Generator().manual_seed(0)
    steps, batch, every = 3200, 16, 200
    walk = torch.randn(steps, 500, generator=generator).cumsum(0) * 0.01 + 1
    tracked = {width: PowerEma([torch.zeros(500)], width) for width in (0.05, 0.1, 0.06, 0.07, 0.12)}
    snapshots: dict[tuple[int, float], dict[str, torch.Tensor]] = {}
    for step, weights in enumerate(walk, start=1):
        for width, ema in tracked.items():
            ema.update([weights], step * batch, batch)
            if step % every == 0:
                snapshots[step * batch, width] = {"w": ema.tensors[0].clone()}
    stored = [at for at in snapshots if at[1] in (0.05, 0.1)]
    for images, width in [(steps * batch, 0.07), (steps * batch, 0.12), (2400 * batch, 0.06), (2400 * batch, 0.05)]:
        coefficients = post_hoc_coefficients(stored, images, width)
        assert coefficients.sum().item() == pytest.approx(1, abs=1e-12)
        rebuilt = combine((snapshots[at] for at in stored), coefficients)["w"]
        direct = snapshots[images, width]["w"]
        nearest = min((snapshots[images, other]["w"] for other in (0.05, 0.1)), key=lambda w: (w - direct).norm())
        assert rebuilt.dtype == torch.float32
        assert (rebuilt - direct).norm() < 1e-3 * direct.norm()
        if (images, width) in stored:
            assert post_hoc_error(stored, coefficients, images, width) < 1e-7
            one_hot = torch.tensor([float(at == (images, width)) for at in stored], dtype=torch.float64)
            torch.testing.assert_close(coefficients, one_hot, rtol=0, atol=1e-9)
            torch.testing.assert_close(rebuilt, direct, rtol=1e-6, atol=0)
        else:
            assert post_hoc_error(stored, coefficients, images, width) < 0.01
            assert (rebuilt - direct).norm() < 0.05 * (nearest - direct).norm()  # not met by picking a stored one


def test_near_singular_snapshots_still_make_small_coefficients() -> None:
    stored = [(images, sigma_rel) for images in range(990_000, 1_000_001, 100) for sigma_rel in (0.05, 0.0500001, 0.1)]
    stored += stored[-3:]
    coefficients = post_hoc_coefficients(stored, 1_000_000, 0.07)
    assert coefficients.sum().item() == pytest.approx(1, abs=1e-6)
    assert post_hoc_error(stored, coefficients, 1_000_000, 0.07) < 0.05
    assert post_hoc_coefficients([(10, 0.1)] * 2, 10, 0.1).tolist() == pytest.approx([0.5, 0.5])


def test_combine_adds_in_float64() -> None:
    snapshots = [{"a": torch.tensor([1e8]), "b": torch.ones(2)}, {"a": torch.tensor([1.0]), "b": torch.zeros(2)}]
    snapshots.append({"a": torch.tensor([-1e8]), "b": torch.ones(2)})
    total = combine(snapshots, torch.ones(3, dtype=torch.float64))
    assert total["a"].tolist() == [1]
    assert total["b"].tolist() == [2, 2]
    assert snapshots[0]["a"].tolist() == [1e8]


def test_bad_input_to_power_averages() -> None:
    for width in (0.0, -0.1, 0.29, math.nan):
        with pytest.raises(ValueError, match="sigma_rel must be"):
            PowerEma([torch.ones(1)], width)
    for gamma in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma must be"):
            power_decay(10, 10, gamma)
    with pytest.raises(ValueError, match="images_seen 5, batch 10"):
        power_decay(5, 10, 1)
    with pytest.raises(ValueError, match="float32"):
        PowerEma([torch.ones(1, dtype=torch.float64)], 0.1)
    with pytest.raises(ValueError, match="no stored"):
        post_hoc_coefficients([], 10, 0.1)
    for images in (0, 101, math.nan):
        with pytest.raises(ValueError, match="latest snapshot's, 100"):
            post_hoc_coefficients([(100, 0.1)], images, 0.1)
    with pytest.raises(ValueError, match="above 0"):
        post_hoc_coefficients([(0, 0.1), (100, 0.1)], 50, 0.1)
    for images in (math.nan, math.inf):
        with pytest.raises(ValueError, match="above 0"):
            post_hoc_coefficients([(images, 0.1), (100, 0.1)], 50, 0.1)
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        combine([{"a": one}, {"a": one}], one)
    with pytest.raises(ValueError, match="differs from the first one in 'b'"):
        combine([{"a": one}, {"a": one, "b": one}], torch.ones(2))
    with pytest.raises(ValueError, match="'a'"):
        combine([{"a": one}, {"a": torch.ones(2)}], torch.ones(2))
