"""Schedules against their formulas, reckoned number by number, and the mistakes that are named."""

import math
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ddpm_core import GaussianDiffusion, NoiseSchedule

T = 1000


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cosine_curve(t: int) -> float:
    return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2


def sigmoid_curve(t: int) -> float:
    return (sigmoid(3 - 6 * t / T) - sigmoid(-3)) / (sigmoid(3) - sigmoid(-3))


BETAS: dict[str, tuple[NoiseSchedule, Callable[[int], float]]] = {
    "linear": (NoiseSchedule.linear(), lambda t: 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)),
    "quadratic": (NoiseSchedule.quadratic(T), lambda t: (0.01 + (math.sqrt(0.02) - 0.01) * (t - 1) / (T - 1)) ** 2),
    "constant": (NoiseSchedule.constant(T, 0.02), lambda t: 0.02),
    "cosine": (NoiseSchedule.cosine(T), lambda t: min(0.999, 1 - cosine_curve(t) / cosine_curve(t - 1))),
    "sigmoid": (NoiseSchedule.sigmoid(T), lambda t: min(0.999, 1 - sigmoid_curve(t) / sigmoid_curve(t - 1))),
}


@pytest.mark.parametrize("name", BETAS)
def test_schedules_follow_their_formula(name: str) -> None:
    schedule, formula = BETAS[name]
    betas = [formula(t) for t in range(1, T + 1)]
    logs = [math.log1p(-beta) for beta in betas]
    alpha_bar = [math.exp(math.fsum(logs[:t])) for t in range(1, T + 1)]
    posterior = [0.0] + [
        1 / ((1 - betas[t]) / betas[t] + 1 / (1 - alpha_bar[t - 1])) for t in range(1, T)
    ]  # precisions of q(x_t | x_{t-1}) and q(x_{t-1} | x_0) add up
    assert schedule.timesteps == T
    for got, expected in [
        (schedule.beta, betas),
        (schedule.alpha, [1 - beta for beta in betas]),
        (schedule.alpha_bar, alpha_bar),
        (schedule.signal_rate, [math.sqrt(a) for a in alpha_bar]),
        (schedule.noise_rate, [math.sqrt(1 - a) for a in alpha_bar]),
        (schedule.log_snr, [math.log(a / (1 - a)) for a in alpha_bar]),
        (schedule.posterior_variance, posterior),
    ]:
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.signal_rate**2 + schedule.noise_rate**2, torch.ones(T).double())


def test_the_published_end_of_the_linear_schedule() -> None:
    assert NoiseSchedule.linear().alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


def test_the_constant_schedule_ends_where_the_linear_one_does() -> None:
    assert NoiseSchedule.constant().alpha_bar[-1].item() == pytest.approx(0.99**1000, rel=1e-9)
    assert NoiseSchedule.constant().alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=0.1)


def test_a_sigmoid_too_steep_is_named() -> None:
    with pytest.raises(ValueError, match=r"tau|beta"):
        NoiseSchedule.sigmoid(1000, tau=0.004)


@pytest.mark.parametrize(("name", "curve"), [("cosine", cosine_curve), ("sigmoid", sigmoid_curve)])
def test_the_cap_touches_the_last_step_alone(name: str, curve: Callable[[int], float]) -> None:
    schedule = BETAS[name][0]
    expected = torch.tensor([curve(t) for t in range(1, T)], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha_bar[:-1], expected, rtol=1e-9, atol=0)
    assert schedule.beta[-1] == 0.999
    assert schedule.alpha_bar[-1].item() == pytest.approx(0.001 * expected[-1].item(), rel=1e-9)


def test_cosine_ends_where_its_documentation_says() -> None:
    assert NoiseSchedule.cosine(1000).alpha_bar[-1].item() == pytest.approx(2.4e-9, rel=0.02)


def test_from_rates() -> None:
    schedule = NoiseSchedule.from_rates(100, 0.02, 0.95)
    rate = schedule.signal_rate
    assert (rate[0].item(), rate[-1].item()) == (pytest.approx(0.95), pytest.approx(0.02))
    angle = rate.acos()
    torch.testing.assert_close(angle.diff(), (angle[-1] - angle[0]).expand(99) / 99)


def test_beta_and_alpha_bar_define_the_same_schedule() -> None:
    one = NoiseSchedule.linear()
    other = NoiseSchedule.from_alpha_bars(one.alpha_bar.tolist())
    torch.testing.assert_close(other.beta, one.beta, rtol=1e-10, atol=0)
    again = NoiseSchedule.from_betas(one.beta)
    assert torch.equal(again.alpha_bar, one.alpha_bar)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NoiseSchedule.from_betas([0.1, 0.0]), "t = 2 is 0.0"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.0]), "between 0 and 1"),
        (lambda: NoiseSchedule.from_betas([-0.1]), "between 0 and 1"),
        (lambda: NoiseSchedule.from_betas([0.1, math.nan]), "between 0 and 1"),
        (lambda: NoiseSchedule.from_betas([]), "at least one"),
        (lambda: NoiseSchedule.from_betas(torch.full((2, 2), 0.1)), "at least one"),
        (lambda: NoiseSchedule.from_betas([0.999] * 200), "fall"),  # alpha_bar underflows
        (lambda: NoiseSchedule.from_alpha_bars([0.9, 0.9]), "fall strictly"),
        (lambda: NoiseSchedule.from_alpha_bars([0.5, 0.6]), "t = 2 it is 0.6 after 0.5"),
        (lambda: NoiseSchedule.from_alpha_bars([1.0, 0.5]), "fall strictly"),
        (lambda: NoiseSchedule.from_alpha_bars([0.5, 0.0]), "inside"),
        (lambda: NoiseSchedule.from_alpha_bars([0.5, math.nan]), "inside"),
        (lambda: NoiseSchedule.linear(0), "timesteps must be 1 or more"),
        (lambda: NoiseSchedule.linear(10, 0.1, 1.5), "between 0 and 1"),
        (lambda: NoiseSchedule.quadratic(10, -0.1, 0.1), "beta_start"),
        (lambda: NoiseSchedule.cosine(0), "timesteps must be 1 or more"),
        (lambda: NoiseSchedule.cosine(10, s=-1), "s must"),
        (lambda: NoiseSchedule.cosine(10, s=math.inf), "s must be 0 or more, and finite"),
        (lambda: NoiseSchedule.sigmoid(10, end=math.inf), "finite start < end"),
        (lambda: NoiseSchedule.linear(100.5), "timesteps must be an integer, not 100.5"),  # type: ignore[arg-type]
        (lambda: NoiseSchedule.sigmoid(10.0), "timesteps must be an integer, not 10.0"),  # type: ignore[arg-type]
        (lambda: NoiseSchedule.quadratic(10, math.nan, 0.1), "beta_start"),
        (lambda: NoiseSchedule.from_rates(1, 0.1, 0.9), "two timesteps or more"),
        (lambda: NoiseSchedule.sigmoid(10, start=1, end=0), "start < end"),
        (lambda: NoiseSchedule.from_rates(10, 0.9, 0.1), "min_signal_rate"),
        (lambda: NoiseSchedule.from_rates(10, 0.0, 0.9), "min_signal_rate"),
        (lambda: NoiseSchedule.linear().respace(0), "1..1000"),
        (lambda: NoiseSchedule.linear().respace(1001), "1..1000"),
        (lambda: NoiseSchedule.linear().respace(2.5), "steps must be an integer, not 2.5"),  # type: ignore[arg-type]
        (lambda: NoiseSchedule.linear().respace(True), "steps must be an integer, not True"),
        (lambda: NoiseSchedule.linear().respace(10, "even"), "leading, linspace, trailing"),
        (lambda: NoiseSchedule.cosine(1).rescale_zero_terminal(), "one timestep"),
    ],
)
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_bad_input_is_named(make: Callable[[], NoiseSchedule], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_warns_where_signal_is_left() -> None:
    with pytest.warns(UserWarning, match="signal rate 0.6"):
        NoiseSchedule.linear(100)
    with pytest.warns(UserWarning, match="leading spacing start at t = 600; others start at 1000"):
        NoiseSchedule.linear().respace(600, "leading")  # 1..600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoiseSchedule.linear().respace(600, "linspace").respace(50, "trailing")
        NoiseSchedule.cosine(50)


def test_respacing_warns_where_it_leaves_more_signal_than_the_schedule() -> None:
    with pytest.warns(UserWarning, match="alpha_bar"):
        schedule = NoiseSchedule.linear(100)
    with pytest.warns(UserWarning, match="leading spacing start at t = 60; others start at 100"):
        schedule.respace(60, "leading")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.respace(10, "trailing")  # ends where the schedule does, which has said so


def test_warnings_point_at_the_caller() -> None:
    for make in (
        lambda: NoiseSchedule.linear(100),
        lambda: GaussianDiffusion(NoiseSchedule.linear()).respace(600, "leading"),
    ):
        with pytest.warns(UserWarning, match="alpha_bar") as caught:
            make()
        assert [warning.filename for warning in caught] == [__file__]


def test_any_integer_is_a_number_of_timesteps() -> None:
    assert NoiseSchedule.cosine(np.int64(50)).respace(np.int32(7)).timesteps == 7  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("leading", 3, [1, 4, 7]),
        ("linspace", 3, [1, 6, 10]),
        ("trailing", 3, [3, 7, 10]),
        ("leading", 1, [1]),
        ("linspace", 1, [10]),
        ("trailing", 1, [10]),
    ],
)
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_respacing_chooses(spacing: str, steps: int, expected: list[int]) -> None:
    assert NoiseSchedule.cosine(10).respace(steps, spacing).original_timesteps.tolist() == expected


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_any_respacing_is_a_rising_subset(spacing: str) -> None:
    for total in (1, 2, 3, 7, 16, 100):
        schedule = NoiseSchedule.cosine(total)
        for steps in range(1, total + 1):
            chosen = schedule.respace(steps, spacing).original_timesteps
            assert len(chosen) == steps
            assert chosen[0] >= 1
            assert chosen[-1] <= total
            assert (chosen.diff() > 0).all()
        assert torch.equal(schedule.respace(total, spacing).original_timesteps, schedule.original_timesteps)


def test_a_respaced_step_is_its_steps_in_one() -> None:
    schedule = NoiseSchedule.linear()
    respaced = schedule.respace(40, "trailing")
    chosen = respaced.original_timesteps
    assert torch.equal(respaced.alpha_bar, schedule.alpha_bar[chosen - 1])
    previous = 0
    for t, beta in zip(chosen.tolist(), respaced.beta.tolist(), strict=True):
        assert 1 - beta == pytest.approx((1 - schedule.beta[previous:t]).prod().item(), rel=1e-10)
        previous = t
    again = respaced.respace(10, "leading")
    assert torch.equal(again.original_timesteps, chosen[0::4])
    torch.testing.assert_close(schedule.respace(1000).beta, schedule.beta, rtol=1e-10, atol=0)


def test_respacing_survives_betas_that_round_to_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = NoiseSchedule.linear(10_000, 1e-4, 0.05).respace(10, "trailing")
    assert schedule.beta[-1] == 1
    assert schedule.alpha[-1] > 0
    assert schedule.posterior_variance.isfinite().all()


def test_zero_terminal() -> None:
    schedule = NoiseSchedule.linear(T).rescale_zero_terminal()
    root = [math.sqrt(a) for a in NoiseSchedule.linear(T).alpha_bar.tolist()]
    expected = [(r - root[-1]) * root[0] / (root[0] - root[-1]) for r in root]
    torch.testing.assert_close(schedule.signal_rate, torch.tensor(expected, dtype=torch.float64))
    assert (schedule.alpha_bar[-1], schedule.beta[-1]) == (0, 1)
    assert schedule.log_snr[-1] == -math.inf
    assert schedule.log_snr[:-1].isfinite().all()
    assert schedule.posterior_variance.isfinite().all()
    assert schedule.respace(10, "trailing").alpha_bar[-1] == 0


def test_a_schedule_does_not_change() -> None:
    schedule = NoiseSchedule.linear()
    before = schedule.alpha_bar
    for name in ("beta", "alpha", "alpha_bar", "signal_rate", "original_timesteps"):
        getattr(schedule, name).zero_()
    betas = torch.full((10,), 0.9, dtype=torch.float64)
    own = NoiseSchedule.from_betas(betas)
    betas.zero_()
    assert torch.equal(schedule.alpha_bar, before)
    assert (own.beta == 0.9).all()
    with pytest.raises(AttributeError):
        schedule.beta = betas  # type: ignore[misc]


def test_pickling_keeps_it() -> None:
    schedule = NoiseSchedule.cosine(100).respace(10, "trailing")
    copy = pickle.loads(pickle.dumps(schedule))
    assert torch.equal(copy.alpha_bar, schedule.alpha_bar)
    assert torch.equal(copy.original_timesteps, schedule.original_timesteps)
