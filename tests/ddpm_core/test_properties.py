"""What holds for every schedule, number of timesteps and shape. The examples are the same in every run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule
from ddpm_core.diffusion import PREDICTIONS
from ddpm_core.schedule import SPACINGS
from tests.ddpm_core.gaussian_oracle import answers

settings.register_profile("ddpm_core", derandomize=True, deadline=None, database=None, max_examples=100)
EXAMPLES = settings.get_profile("ddpm_core")

pytestmark = pytest.mark.filterwarnings("ignore:alpha_bar")  # signal left at T is none of the properties' concern

TIMESTEPS = st.integers(1, 300)
BETAS = st.floats(1e-6, 0.9)


@st.composite
def by_formula(draw: st.DrawFn) -> NoiseSchedule:
    """A schedule of a named kind, any parameters. alpha_bar stays above 1e-300: 0.9 for 300 steps would not."""
    kind = draw(st.sampled_from(["linear", "quadratic", "constant", "cosine", "sigmoid", "rates"]))
    timesteps = draw(TIMESTEPS)
    if kind in ("linear", "quadratic"):
        return getattr(NoiseSchedule, kind)(timesteps, *draw(st.tuples(BETAS, BETAS)))
    if kind == "constant":
        return NoiseSchedule.constant(timesteps, draw(BETAS))
    if kind == "cosine":
        return NoiseSchedule.cosine(timesteps, draw(st.floats(0, 1)))
    if kind == "sigmoid":
        start, width, tau = draw(st.tuples(st.floats(-6, 5), st.floats(0.1, 6), st.floats(0.3, 3)))
        return NoiseSchedule.sigmoid(timesteps, start, start + width, tau)
    low, high = sorted(draw(st.lists(st.floats(1e-4, 0.9999), min_size=2, max_size=2, unique=True)))
    # Rates so close that a step of them cannot be told from none are no schedule.
    return NoiseSchedule.from_rates(max(2, timesteps), low, min(high + 1e-6, 0.99999))


@st.composite
def by_list(draw: st.DrawFn) -> NoiseSchedule:
    """Any betas, or the alpha_bars that they make."""
    betas = draw(st.lists(st.floats(1e-9, 0.999), min_size=1, max_size=60))
    if draw(st.booleans()):
        return NoiseSchedule.from_betas(betas)
    return NoiseSchedule.from_alpha_bars(
        [math.exp(math.fsum(map(math.log1p, (-b for b in betas[: i + 1])))) for i in range(len(betas))]
    )


SCHEDULES = by_formula() | by_list()
IMAGES = st.lists(st.integers(1, 4), min_size=1, max_size=5)  # [N, ...], of any number of dimensions


def column(values: Tensor, t: Tensor, shape: list[int]) -> Tensor:
    return values[t - 1].view(-1, *[1] * (len(shape) - 1))


def normals(shape: list[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def timesteps_of(draw: st.DrawFn, schedule: NoiseSchedule, images: int) -> Tensor:
    each = st.integers(1, schedule.timesteps)
    return torch.tensor(draw(st.lists(each, min_size=images, max_size=images)))


@given(SCHEDULES)
@EXAMPLES
def test_a_schedule_loses_signal_at_every_step(schedule: NoiseSchedule) -> None:
    beta, alpha_bar = schedule.beta, schedule.alpha_bar
    ones = torch.ones(schedule.timesteps, dtype=torch.float64)
    assert ((beta > 0) & (beta < 1)).all()
    assert ((alpha_bar > 0) & (alpha_bar < 1)).all()
    assert (alpha_bar.diff() < 0).all()
    torch.testing.assert_close(schedule.signal_rate**2 + schedule.noise_rate**2, ones)
    assert (schedule.signal_rate.diff() < 0).all()
    assert (schedule.log_snr.diff() < 0).all()
    torch.testing.assert_close(schedule.log_snr, 2 * (schedule.signal_rate.log() - schedule.noise_rate.log()))
    # beta and alpha_bar say the same, alpha is what is left of 1.
    torch.testing.assert_close((1 - beta).log().cumsum(0), alpha_bar.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.alpha, 1 - beta, rtol=1e-9, atol=0)
    assert torch.equal(schedule.original_timesteps, torch.arange(1, schedule.timesteps + 1))


@given(SCHEDULES)
@EXAMPLES
def test_the_posterior_is_narrower_than_the_step(schedule: NoiseSchedule) -> None:
    """Knowing x0 as well as x_t cannot leave more in doubt: precisions add up."""
    tilde, beta = schedule.posterior_variance, schedule.beta
    assert tilde[0] == 0
    assert (tilde[1:] > 0).all()
    assert (tilde <= beta).all()  # equal where alpha_bar is lost beside 1
    precision = (1 - beta[1:]) / beta[1:] + 1 / (1 - schedule.alpha_bar[:-1])
    torch.testing.assert_close(1 / tilde[1:], precision, rtol=1e-6, atol=0)


@given(SCHEDULES.filter(lambda schedule: schedule.timesteps > 1))
@EXAMPLES
def test_rescaling_ends_without_signal_and_keeps_the_start(schedule: NoiseSchedule) -> None:
    rescaled = schedule.rescale_zero_terminal()
    assert (rescaled.alpha_bar[-1], rescaled.beta[-1], rescaled.log_snr[-1]) == (0, 1, -math.inf)
    assert rescaled.alpha_bar[0].item() == pytest.approx(schedule.alpha_bar[0].item(), rel=1e-9)
    assert (rescaled.alpha_bar.diff() < 0).all()
    assert ((rescaled.beta > 0) & (rescaled.beta <= 1)).all()
    # Shift and scale keep the proportions of what the signal rate loses.
    lost = -schedule.signal_rate.diff()
    torch.testing.assert_close(
        -rescaled.signal_rate.diff() / rescaled.signal_rate[0], lost / lost.sum(), rtol=1e-6, atol=1e-12
    )


@given(st.data(), SCHEDULES, st.sampled_from(SPACINGS))
@EXAMPLES
def test_any_respacing(data: st.DataObject, schedule: NoiseSchedule, spacing: str) -> None:
    steps = data.draw(st.integers(1, schedule.timesteps))
    respaced = schedule.respace(steps, spacing)
    chosen = respaced.original_timesteps
    assert respaced.timesteps == len(chosen) == steps
    assert (chosen.diff() > 0).all()
    assert chosen[0] >= 1
    if spacing == "leading":
        assert chosen[0] == 1
        assert len(set(chosen.diff().tolist())) <= 1
    else:
        assert chosen[-1] == schedule.timesteps
        # Even, but for the rounding.
        gaps = chosen.diff().tolist()
        assert not gaps or max(gaps) - min(gaps) <= 1
    if spacing == "linspace" and steps > 1:
        assert chosen[0] == 1
    assert torch.equal(respaced.alpha_bar, schedule.alpha_bar[chosen - 1])
    # A step of the new schedule is all steps that it stands for in one.
    log_alpha = torch.cat((torch.zeros(1), schedule.alpha.log())).cumsum(0)
    torch.testing.assert_close(respaced.alpha.log().cumsum(0), log_alpha[chosen], rtol=1e-9, atol=1e-9)
    # Of the whole it is the whole, and what is respaced again keeps its map.
    if steps == schedule.timesteps:
        assert torch.equal(chosen, schedule.original_timesteps)
    again = data.draw(st.integers(1, steps))
    inner = respaced.respace(again, spacing).original_timesteps
    assert set(inner.tolist()) <= set(chosen.tolist())


@given(st.data(), SCHEDULES, IMAGES)
@EXAMPLES
def test_images_of_any_shape_keep_it(data: st.DataObject, schedule: NoiseSchedule, shape: list[int]) -> None:
    process = GaussianDiffusion(schedule)
    t = data.draw(timesteps_of(schedule, shape[0]))
    x0, eps = normals(shape, 0), normals(shape, 1)
    x_t = process.q_sample(x0, t, eps)
    expected = column(schedule.signal_rate, t, shape) * x0 + column(schedule.noise_rate, t, shape) * eps
    torch.testing.assert_close(x_t, expected, rtol=1e-12, atol=1e-12)
    mean, variance = process.posterior(x0, x_t, t)
    assert x_t.shape == mean.shape == variance.shape == x0.shape
    assert x_t.dtype == mean.dtype == variance.dtype == torch.float64
    torch.testing.assert_close(variance, column(schedule.posterior_variance, t, shape).expand(shape))
    # Each image by itself, and its timestep given as [1].
    for i in range(shape[0]):
        one = slice(i, i + 1)
        assert torch.equal(process.q_sample(x0[one], t[one], eps[one]), x_t[one])
        assert torch.equal(process.posterior(x0[one], x_t[one], t[one])[0], mean[one])
    same = process.q_sample(x0, t[:1], eps)
    assert torch.equal(same, process.q_sample(x0, t[:1].expand(shape[0]), eps))
    single = process.q_sample(x0.float(), t, eps.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), x_t, rtol=1e-5, atol=1e-5)
    assert process.q_step(x0, t, eps).shape == x0.shape


@given(st.data(), SCHEDULES, st.lists(st.integers(1, 3), min_size=4, max_size=4), st.sampled_from(PREDICTIONS))
@EXAMPLES
def test_predictions_go_round(data: st.DataObject, schedule: NoiseSchedule, shape: list[int], predict: str) -> None:
    """Whatever a network says, said in another way it stands for the same x0, eps, v and mean."""
    process = GaussianDiffusion(schedule, predict)
    t = data.draw(timesteps_of(schedule, shape[0]))
    x_t, output = normals(shape, 0), normals(shape, 1)
    stands_for = {name: getattr(process, f"predict_{name}")(x_t, t, output) for name in PREDICTIONS}
    assert torch.equal(stands_for[predict], output)
    # What each way amplifies a rounding by, near T (signal) or near 1 (noise).
    alpha_bar, before = (column(a, t, shape) for a in (schedule.alpha_bar, schedule.alpha_bar_prev))
    of_x0 = before.sqrt() * column(schedule.beta, t, shape) / (1 - alpha_bar)
    tolerance = 1e-13 * (1 + 1 / alpha_bar.sqrt()) * (1 + 1 / of_x0) * (1 + 1 / (1 - alpha_bar).sqrt()) ** 2
    for name, said in stands_for.items():
        other = GaussianDiffusion(schedule, name)
        for wanted, value in stands_for.items():
            got = getattr(other, f"predict_{wanted}")(x_t, t, said)
            assert got.shape == x_t.shape
            assert ((got - value).abs() <= tolerance * (1 + value.abs())).all(), f"{wanted} from {predict} by {name}"


@given(st.data(), SCHEDULES, st.lists(st.integers(1, 3), min_size=4, max_size=4))
@EXAMPLES
def test_targets_are_the_truth(data: st.DataObject, schedule: NoiseSchedule, shape: list[int]) -> None:
    t = data.draw(timesteps_of(schedule, shape[0]))
    x0, eps = normals(shape, 0), normals(shape, 1)
    x_t = GaussianDiffusion(schedule).q_sample(x0, t, eps)
    expected = answers(schedule, x0, x_t, t)
    for predict in PREDICTIONS:
        got = GaussianDiffusion(schedule, predict).target(x0, t, eps)
        # eps comes back from x_t divided by the noise rate, v's share of it too.
        torch.testing.assert_close(got, expected[predict], rtol=1e-7, atol=1e-7, msg=lambda m, p=predict: f"{p}: {m}")
