"""Data with a known answer: pixels drawn independently from N(mean, std^2), for which the best network is a formula."""

import math

import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion


class GaussianOracle:
    """The network that answers with the exact conditional expectation, for the process's parameterisation."""

    def __init__(self, process: GaussianDiffusion, mean: float, std: float) -> None:
        self.process, self.mean, self.std = process, mean, std

    def __call__(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        alpha_bar = self.process.schedule.alpha_bar[timestep].view(-1, 1, 1, 1)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x = x_t.double()
        # x0 and x_t are jointly normal; this is the regression of x0 on x_t.
        gain = signal * self.std**2 / (alpha_bar * self.std**2 + 1 - alpha_bar)
        x0 = self.mean + gain * (x - signal * self.mean)
        eps = (x - signal * x0) / noise
        return {"x0": x0, "eps": eps, "v": signal * eps - noise * x0}[self.process.predict]

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
