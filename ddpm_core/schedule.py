"""Noise schedules: how much signal is left at each timestep.

Notation of Ho et al. 2020, "Denoising diffusion probabilistic models" (DDPM). t runs over 1..T; every tensor here
is float64, has shape [T] and holds t = 1 at index 0. beta_t is the variance that one step adds, alpha_t =
1 - beta_t, alpha_bar_t = alpha_1 ... alpha_t, and q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
(equation 4).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from ddpm_core.checks import callers_level, checked_integer

SPACINGS = ("leading", "linspace", "trailing")

# beta of the alpha_bar-defined schedules is cut here (Nichol and Dhariwal 2021, section 3.2); see `cosine`.
MAX_BETA = 0.999

# Above this the last step still shows the image: its signal rate exceeds 0.03, so that the mean brightness of a
# 28x28 image is told apart from noise about as often as not. DDPM's linear schedule has 4e-5, Stable Diffusion's
# 5e-3 (and cannot draw dark pictures: Lin et al. 2023, "Common diffusion noise schedules ... are flawed").
VISIBLE_ALPHA_BAR = 1e-3


class NoiseSchedule:
    """An immutable noise schedule; build one with the class methods.

    Its tensors are copies: writing into them changes nothing here.
    """

    def __init__(
        self,
        beta: Tensor,
        alpha_bar: Tensor,
        original_timesteps: Tensor | None = None,
        original: "NoiseSchedule | None" = None,
    ) -> None:
        """For the class methods, which check their input. `original_timesteps` is None for 1..T."""
        self._beta = beta.detach().to("cpu", torch.float64, copy=True)
        self._alpha_bar = alpha_bar.detach().to("cpu", torch.float64, copy=True)
        if original_timesteps is None:
            original_timesteps = torch.arange(1, len(beta) + 1)
        self._original_timesteps = original_timesteps.detach().to("cpu", torch.int64, copy=True)
        self._original = original

    def __repr__(self) -> str:
        return f"NoiseSchedule(timesteps={self.timesteps}, alpha_bar_T={self._alpha_bar[-1].item():.3g})"

    # By beta.

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> Self:
        """From beta_1..beta_T, each in (0, 1), else ValueError."""
        beta = _vector(betas, "beta")
        bad = ~((beta > 0) & (beta < 1))  # so written, NaN is bad too
        if bad.any():
            t = int(bad.nonzero()[0]) + 1
            raise ValueError(f"beta must lie strictly between 0 and 1, but beta at t = {t} is {beta[t - 1].item()}")
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        _check_alpha_bar(alpha_bar)
        return cls(beta, alpha_bar)._warned()

    @classmethod
    def linear(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """beta linear in t (DDPM, section 4).

        The defaults are meant for T = 1000. With fewer steps and the same betas, signal is left at T (a
        UserWarning says so): raise the betas by 1000 / T, or respace the 1000-step schedule.
        """
        return cls.from_betas(_line(beta_start, beta_end, timesteps))

    @classmethod
    def quadratic(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """sqrt(beta) linear in t (DDPM's code calls it "quad", diffusers "scaled_linear")."""
        if not min(beta_start, beta_end) >= 0:
            raise ValueError(f"beta_start and beta_end must be in (0, 1), not {beta_start} and {beta_end}")
        return cls.from_betas(_line(math.sqrt(beta_start), math.sqrt(beta_end), timesteps) ** 2)

    @classmethod
    def constant(cls, timesteps: int = 1000, beta: float = 0.01) -> Self:
        """The same beta at every step. 0.01 ends where the linear schedule's defaults do."""
        return cls.from_betas(_line(beta, beta, timesteps))

    # By alpha_bar.

    @classmethod
    def from_alpha_bars(cls, alpha_bars: Sequence[float] | Tensor) -> Self:
        """From alpha_bar_1..alpha_bar_T, strictly falling inside (0, 1), else ValueError."""
        alpha_bar = _vector(alpha_bars, "alpha_bar")
        _check_alpha_bar(alpha_bar)
        return cls(_beta_of(alpha_bar), alpha_bar)._warned()

    @classmethod
    def cosine(cls, timesteps: int = 1000, s: float = 0.008) -> Self:
        """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2) (Nichol and Dhariwal 2021, eq. 17).

        beta is cut at 0.999, for f(T) = 0 makes beta_T = 1. Consequence: the cut touches the last step alone, and
        alpha_bar_T is 0.001 alpha_bar_{T-1} (2.4e-9 for T = 1000) instead of 0. A network that predicts eps then
        has its error at T divided by sqrt(alpha_bar_T), that is multiplied by 20,000: sample with clipping of
        x0, or let the network predict v or x0.
        """
        if not 0 <= s < math.inf:
            raise ValueError(f"s must be 0 or more, and finite, not {s}")
        return cls._from_capped(timesteps, lambda u: math.cos((u + s) / (1 + s) * math.pi / 2) ** 2)

    @classmethod
    def sigmoid(cls, timesteps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Self:
        """alpha_bar falls along a sigmoid (Jabri et al. 2022, "Scalable adaptive computation for iterative
        generation").

        alpha_bar(u) is sigmoid(-(start + u (end - start)) / tau), shifted and scaled to run from 1 at u = 0 to 0
        at u = t/T = 1. beta is cut at 0.999, with the consequence told at `cosine`.
        """
        if not (-math.inf < start < end < math.inf and 0 < tau < math.inf):
            raise ValueError(f"finite start < end and tau > 0 are needed, not start {start}, end {end}, tau {tau}")
        first, last = _falling_sigmoid(start / tau), _falling_sigmoid(end / tau)

        def signal(u: float) -> float:
            return (_falling_sigmoid((start + u * (end - start)) / tau) - last) / (first - last)

        return cls._from_capped(timesteps, signal)

    @classmethod
    def from_rates(cls, timesteps: int, min_signal_rate: float, max_signal_rate: float) -> Self:
        """Signal rate = cos(angle), the angle linear in t from acos(max_signal_rate) at t = 1 to
        acos(min_signal_rate) at T. ValueError unless 0 < min_signal_rate < max_signal_rate < 1, and for a single
        timestep, which cannot have both.
        """
        if not 0 < min_signal_rate < max_signal_rate < 1:
            raise ValueError(
                "0 < min_signal_rate < max_signal_rate < 1 is needed, "
                f"not min_signal_rate {min_signal_rate}, max_signal_rate {max_signal_rate}"
            )
        if _checked_count(timesteps) < 2:
            raise ValueError("two rates need two timesteps or more, not 1")
        angle = _line(math.acos(max_signal_rate), math.acos(min_signal_rate), timesteps)
        return cls.from_alpha_bars(angle.cos() ** 2)

    @classmethod
    def _from_capped(cls, timesteps: int, signal: Callable[[float], float]) -> Self:
        """From alpha_bar as a function of t/T in 0..1, beta cut at MAX_BETA."""
        timesteps = _checked_count(timesteps)
        curve = [signal(t / timesteps) for t in range(timesteps + 1)]
        if min(curve[:-1]) <= 0:
            raise ValueError("no signal is left long before the last timestep: choose a gentler curve (a larger tau)")
        return cls.from_betas([min(1 - now / before, MAX_BETA) for before, now in pairwise(curve)])

    # What a schedule is.

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self._beta)

    @property
    def original_timesteps(self) -> Tensor:
        """int64 [T]: the timestep, in 1..T of the schedule trained on, that each step stands for."""
        return self._original_timesteps.clone()

    @property
    def original(self) -> "NoiseSchedule":
        """The schedule that this one is a respacing of, on which the network was trained; itself if of none."""
        return self if self._original is None else self._original

    @property
    def beta(self) -> Tensor:
        return self._beta.clone()

    @property
    def alpha(self) -> Tensor:
        """alpha_bar_t / alpha_bar_{t-1}: exact where 1 - beta would have rounded."""
        return self._alpha_bar / self.alpha_bar_prev

    @property
    def alpha_bar(self) -> Tensor:
        return self._alpha_bar.clone()

    @property
    def alpha_bar_prev(self) -> Tensor:
        """alpha_bar_{t-1}, with alpha_bar_0 = 1."""
        return torch.cat((torch.ones(1, dtype=torch.float64), self._alpha_bar[:-1]))

    @property
    def signal_rate(self) -> Tensor:
        """sqrt(alpha_bar): the factor of x_0 in x_t. signal_rate^2 + noise_rate^2 = 1."""
        return self._alpha_bar.sqrt()

    @property
    def noise_rate(self) -> Tensor:
        """sqrt(1 - alpha_bar): the standard deviation of the noise in x_t."""
        return (1 - self._alpha_bar).sqrt()

    @property
    def log_snr(self) -> Tensor:
        """log(alpha_bar / (1 - alpha_bar)), natural logarithm; -inf at T of a zero-terminal schedule."""
        return self._alpha_bar.log() - torch.log1p(-self._alpha_bar)

    @property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0): (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t, 0 at t = 1
        (DDPM, eq. 7).
        """
        return (1 - self.alpha_bar_prev) / (1 - self._alpha_bar) * self._beta

    @property
    def posterior_factors(self) -> tuple[Tensor, Tensor]:
        """What x_0 and x_t are multiplied by in the mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
        of_x0 = self.alpha_bar_prev.sqrt() * self._beta / (1 - self._alpha_bar)
        return of_x0, self.alpha.sqrt() * (1 - self.alpha_bar_prev) / (1 - self._alpha_bar)

    # What can be made of one.

    def respace(self, steps: int, spacing: str = "trailing") -> Self:
        """The schedule of a subset of `steps` timesteps, for sampling in fewer (Nichol and Dhariwal 2021, eq. 19).

        alpha_bar is kept at the chosen timesteps and beta follows; `original_timesteps` says which they are.
        "leading": 1, 1 + k, 1 + 2k, ... with k = T // steps, so that sampling starts below T (far below it where
        T / steps is barely under a whole number: a UserWarning says so where it shows). "linspace": evenly from 1
        to T, both included (one step: T). "trailing": T, T - T/steps, ... ValueError unless 1 <= steps <= T, and for
        another spacing.
        """
        total = self.timesteps
        check_spacing(spacing)
        if not 1 <= checked_integer(steps, "steps") <= total:
            raise ValueError(f"steps must be in 1..{total} (the schedule's timesteps), not {steps}")
        if spacing == "leading":
            chosen = [1 + i * (total // steps) for i in range(steps)]
        elif spacing == "linspace":
            chosen = [round(1 + i * (total - 1) / (steps - 1)) for i in range(steps)] if steps > 1 else [total]
        else:
            chosen = [round(total - i * total / steps) for i in reversed(range(steps))]
        index = torch.tensor(chosen) - 1
        alpha_bar = self._alpha_bar[index]
        respaced = type(self)(_beta_of(alpha_bar), alpha_bar, self._original_timesteps[index], self.original)
        if chosen[-1] == total:
            return respaced  # if it leaves signal, then so does the schedule itself, which has said so
        return respaced._warned(
            f"{steps} steps with {spacing} spacing start at t = {chosen[-1]}; others start at {total}"
        )

    def rescale_zero_terminal(self) -> Self:
        """Shift and scale the signal rate to end at 0 and keep its first value (Lin et al. 2023, algorithm 1).

        The one way to beta_T = 1: log_snr is -inf at T, where eps says nothing about x_0, so that only x0 and v
        can be predicted. ValueError where T = 1, and for a respaced schedule: rescale first.
        """
        rate = self.signal_rate
        if self._original is not None:
            raise ValueError("a respaced schedule cannot be rescaled: rescale the original one, then respace that")
        if self.timesteps == 1:
            raise ValueError("a schedule of one timestep cannot be rescaled to zero terminal signal")
        rate = (rate - rate[-1]) * (rate[0] / (rate[0] - rate[-1]))
        alpha_bar = rate**2
        return type(self)(_beta_of(alpha_bar), alpha_bar, self._original_timesteps)

    def _warned(self, remedy: str = "more timesteps or larger betas would close the gap") -> Self:
        last = self._alpha_bar[-1].item()
        if last > VISIBLE_ALPHA_BAR:
            warnings.warn(
                f"alpha_bar is {last:.3g} at the last timestep: x_T still shows the image (signal rate "
                f"{math.sqrt(last):.3g}), but sampling starts from pure noise; {remedy}",
                UserWarning,
                stacklevel=callers_level(),
            )
        return self


def check_spacing(spacing: str) -> None:
    """ValueError for what is no spacing of `NoiseSchedule.respace`."""
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")


def _vector(values: Sequence[float] | Tensor, name: str) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64).cpu()
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"{name} must be a list of at least one number, not of shape {list(vector.shape)}")
    return vector


def _checked_count(timesteps: int) -> int:
    if checked_integer(timesteps, "timesteps") < 1:
        raise ValueError(f"timesteps must be 1 or more, not {timesteps}")
    return int(timesteps)


def _line(first: float, last: float, timesteps: int) -> Tensor:
    return torch.linspace(first, last, _checked_count(timesteps), dtype=torch.float64)


def _check_alpha_bar(alpha_bar: Tensor) -> None:
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    # Compared by ratio, for a fall that beta cannot express (below 1e-16) is none.
    bad = ~((alpha_bar > 0) & (alpha_bar / before < 1))
    if bad.any():
        t = int(bad.nonzero()[0]) + 1
        raise ValueError(
            "alpha_bar must fall strictly and stay inside (0, 1), "
            f"but at t = {t} it is {alpha_bar[t - 1].item()} after {before[t - 1].item()}"
        )


def _falling_sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(v)) if v < 700 else 0.0  # beyond, exp overflows


def _beta_of(alpha_bar: Tensor) -> Tensor:
    return 1 - alpha_bar / torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
