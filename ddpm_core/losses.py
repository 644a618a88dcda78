"""Losses as functions: weightings of the training loss, and the exact terms of the variational bound.

Ho et al. 2020 (DDPM), equation 5: L = L_T + sum over t = 2..T of L_{t-1} + L_0, where L_T is the distance of
q(x_T) from the prior, L_{t-1} the divergence of the reverse step from the posterior, and L_0 the decoder's
negative log-likelihood of 8-bit pixels.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ddpm_core.diffusion import GaussianDiffusion

# Weights [N] of the training loss at timesteps t [N].
Weighting = Callable[["GaussianDiffusion", Tensor], Tensor]

LEVELS = 256  # 8-bit pixels: x0 lies on the grid -1, -1 + 2/255, ..., 1


def uniform(process: "GaussianDiffusion", t: Tensor) -> Tensor:
    """Weight 1 at every timestep: L_simple (DDPM, eq. 14) where the network predicts eps."""
    return torch.ones(t.shape, dtype=torch.float32, device=t.device)


def gaussian_kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)), elementwise, in nats. All variances above 0."""
    return 0.5 * ((other_variance / variance).log() + (variance + (mean - other_mean).square()) / other_variance - 1)


def decoder_nll(x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """-log of the probability that N(mean, variance) gives to the 8-bit pixel x0, elementwise, in nats.

    DDPM, eq. 13: the mass within half a level (1/255) of x0, the outermost pixels taking the tails. No floor is
    put under the probability. Computed from log-CDFs, so that it is right far out in the tails: use float64.
    """
    sigma = variance.sqrt()
    level = ((x0 + 1) * ((LEVELS - 1) / 2)).round()
    low = torch.where(level <= 0, -math.inf, (x0 - 1 / (LEVELS - 1) - mean) / sigma)
    high = torch.where(level >= LEVELS - 1, math.inf, (x0 + 1 / (LEVELS - 1) - mean) / sigma)
    # By symmetry, take the side on which the CDF is small and keeps its digits.
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_high = torch.special.log_ndtr(high)
    return -(log_high + torch.log1p(-(torch.special.log_ndtr(low) - log_high).exp()))


def vlb_term(process: "GaussianDiffusion", x0: Tensor, x_t: Tensor, t: Tensor, output: Tensor, clip_x0: bool) -> Tensor:
    """The bound's term at t, float64 [N] in bits per dimension: L_{t-1} for t >= 2, the decoder's L_0 for t = 1.

    `output` is the network's at x_t. With `clip_x0` the bound is that of the model which clips its predicted x0,
    as sampling does.
    """
    x0, x_t = x0.double(), x_t.double()
    model = process.reverse(x_t, t, output, clip_x0)
    mean, variance = process.posterior(x0, x_t, t)
    first = (t == 1).view(-1, *[1] * (x0.ndim - 1)).to(x0.device)
    # The posterior's variance is 0 at t = 1; the value put in is not used.
    kl = gaussian_kl(mean, torch.where(first, 1.0, variance), model.mean, model.variance)
    nats = torch.where(first, decoder_nll(x0, model.mean, model.variance), kl) if first.any() else kl
    return nats.flatten(1).mean(1) / math.log(2)


def prior_term(process: "GaussianDiffusion", x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)), float64 [N] in bits per dimension. It does not depend on the network."""
    x0 = x0.double()
    alpha_bar = process.schedule.alpha_bar[-1].to(x0.device)
    mean, variance = alpha_bar.sqrt() * x0, (1 - alpha_bar).expand_as(x0)
    kl = gaussian_kl(mean, variance, torch.zeros_like(mean), torch.ones_like(mean))
    return kl.flatten(1).mean(1) / math.log(2)
