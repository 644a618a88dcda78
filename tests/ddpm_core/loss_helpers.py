"""One denoiser, said in every parameterisation, and what its losses are compared with."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

from ddpm_core import GaussianDiffusion, NoiseSchedule
from tests.ddpm_core.gaussian_oracle import answers

GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1
LINEAR = NoiseSchedule.linear()
LEARNED = GaussianDiffusion(LINEAR, "eps", "learned_range")


def noised(t: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit images, float64 [len(t), 2, 5, 5], what a network takes for them, and noise."""
    generator = torch.Generator().manual_seed(seed)
    x0 = GRID[torch.randint(0, 256, (len(t), 2, 5, 5), generator=generator)]
    guess = x0 + 0.3 * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return x0, guess, torch.randn(x0.shape, generator=generator, dtype=x0.dtype)


def takes_for(process: GaussianDiffusion, guess: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network that takes x_t for a noised `guess`."""
    return lambda x_t, timestep: answers(process.schedule, guess, x_t, timestep + 1)[process.predict]


def level_nll(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """-log of what N(mean, std^2) gives to the 8-bit levels x0, in nats. A difference of CDFs: good near the mean."""
    normal = Normal(mean, std)
    below = torch.where(x0 == -1, 0.0, normal.cdf(x0 - 1 / 255))
    above = torch.where(x0 == 1, 1.0, normal.cdf(x0 + 1 / 255))
    return -(above - below).log()


def pixelwise(column: Tensor, t: Tensor) -> Tensor:
    return column[t - 1].view(-1, 1, 1, 1)


def mean_of(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
