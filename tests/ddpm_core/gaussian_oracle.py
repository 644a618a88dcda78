"""Known answers: what stands for an image in each parameterisation, and data whose best network is a formula."""

import math

import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule


def answers(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
    """What stands for x0 [N, C, H, W] at x_t and t [N], by what is predicted. From the definitions, in float64."""
    x0, x_t = x0.double(), x_t.double()
    alpha_bar, alpha_bar_prev, beta = (
        column[t - 1].view(-1, 1, 1, 1) for column in (schedule.alpha_bar, schedule.alpha_bar_prev, schedule.beta)
    )
    eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    # The posterior's mean, by its precisions: those of q(x_t | x_{t-1}) and q(x_{t-1} | x_0) add up.
    likelihood, prior = (1 - beta) / beta, 1 / (1 - alpha_bar_prev)
    weighed = (1 - beta).sqrt() / beta * x_t + prior * alpha_bar_prev.sqrt() * x0
    mean = torch.where(alpha_bar_prev == 1, x0, weighed / (likelihood + prior))
    return {"eps": eps, "x0": x0, "v": v, "mean": mean}


def even_log_snr(steps: int, first: float = 6.0, last: float = -12.0) -> NoiseSchedule:
    """A schedule whose log-SNR falls evenly."""
    return NoiseSchedule.from_alpha_bars(torch.linspace(first, last, steps, dtype=torch.float64).sigmoid())


class GaussianOracle:
    """For pixels drawn independently from N(mean, std^2): the network that answers with the exact conditional
    expectation, in the process's parameterisation.

    For a learned variance it answers, too, what makes the reverse step's variance the exact one: that of x_{t-1}
    given x_t. `process` is the one trained on; another may be sampled.
    """

    def __init__(self, process: GaussianDiffusion, mean: float, std: float) -> None:
        self.process, self.mean, self.std = process, mean, std

    def __call__(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        schedule = self.process.schedule
        alpha_bar, alpha_bar_prev, alpha, beta, tilde = (
            column[timestep].view(-1, 1, 1, 1)
            for column in (
                schedule.alpha_bar,
                schedule.alpha_bar_prev,
                schedule.alpha,
                schedule.beta,
                schedule.posterior_variance,
            )
        )
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x = x_t.double()
        now, before = (a * self.std**2 + 1 - a for a in (alpha_bar, alpha_bar_prev))  # variances of x_t and x_{t-1}
        # x0 and x_t are jointly normal; this is the regression of x0 on x_t. So for x_{t-1}.
        x0 = self.mean + signal * self.std**2 / now * (x - signal * self.mean)
        eps = (x - signal * x0) / noise
        mean = alpha_bar_prev.sqrt() * self.mean + alpha.sqrt() * before / now * (x - signal * self.mean)
        answer = {"x0": x0, "eps": eps, "v": signal * eps - noise * x0, "mean": mean}[self.process.predict]
        if self.process.variance != "learned_range":
            return answer
        # Nothing is drawn with the variance at t = 1, where beta_tilde is 0.
        variance = before * beta / now
        share = ((variance / tilde).log() / (beta / tilde).log()).where(tilde > 0, torch.ones_like(tilde))
        return torch.cat((answer, (2 * share - 1).expand_as(answer)), dim=1)

    def variance(self, t: int) -> float:
        """Of the pixels of x_t; t = 0 is the data."""
        alpha_bar = self.process.schedule.alpha_bar[t - 1].item() if t else 1.0
        return alpha_bar * self.std**2 + 1 - alpha_bar

    def flow(self, x: Tensor, start: int, end: int) -> Tensor:
        """Where the probability-flow ODE takes x from t = start to t = end: float64, in closed form.

        The ODE of linear drift keeps each pixel's standard score (Song et al. 2021, "Score-based generative modeling
        through stochastic differential equations", section 4.3).
        """
        alpha_bars = [1.0, *self.process.schedule.alpha_bar.tolist()]
        score = (x.double() - math.sqrt(alpha_bars[start]) * self.mean) / math.sqrt(self.variance(start))
        return math.sqrt(alpha_bars[end]) * self.mean + math.sqrt(self.variance(end)) * score

    def expected_term(self, x0: Tensor, t: int) -> Tensor:
        """Bits per dimension of L_{t-1}, t >= 2, small variance, averaged over the noise in closed form: [N]."""
        before, now = self.process.schedule.alpha_bar[[t - 2, t - 1]].tolist()
        gain = self.std**2 * math.sqrt(now) / (now * self.std**2 + 1 - now)
        bias = (x0.double() - self.mean) * (1 - gain * math.sqrt(now))
        error = bias.square().flatten(1).mean(1) + gain**2 * (1 - now)
        return (before / (1 - before) - now / (1 - now)) / 2 * error / math.log(2)

    def true_bits(self, x0: Tensor) -> Tensor:
        """-log2 of the probability of the 8-bit pixels under N(mean, std^2) itself, a dimension: [N]."""
        normal = torch.distributions.Normal(torch.tensor(self.mean).double(), torch.tensor(self.std).double())
        mass = normal.cdf(x0.double() + 1 / 255) - normal.cdf(x0.double() - 1 / 255)
        return -mass.log2().flatten(1).mean(1)


def draw_8bit(n: int, shape: tuple[int, int, int], mean: float, std: float, seed: int) -> Tensor:
    """8-bit images from N(mean, std^2), float32 on the grid in [-1, 1]."""
    values = mean + std * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    return ((values.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
