"""Which timesteps are trained on or evaluated: evenly, or where the bound is large.

A density over t = 1..T is a float64 tensor [T] that sums to 1. All of them follow from the schedule alone: Nichol and
Dhariwal 2021 ("Improved DDPM", section 3.3) draw t by a history of losses, which would make a training step depend on
all that came before it, on every worker.
"""

import math

import torch
from torch import Tensor

from ddpm_core.checks import checked_timesteps
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.losses import LEVELS

# Part of the draws that is spread evenly over the timesteps, whatever the schedule says, for models that err elsewhere.
EVEN_PART = 0.1

# Variance of the pixels, in units of [-1, 1]^2, that the densities reckon with. Tried on digits with 8 calls an image:
# anything from 0.2 to 1 leaves an image's estimate of bits/dim an error of about 0.33, where images differ by 0.62 and
# evenly spread timesteps would err by 9.
PIXEL_VARIANCE = 0.25


def uniform_density(process: GaussianDiffusion) -> Tensor:
    """Every timestep alike, as DDPM trains (algorithm 1)."""
    return torch.full((process.timesteps,), 1 / process.timesteps, dtype=torch.float64)


def vlb_density(process: GaussianDiffusion) -> Tensor:
    """In proportion to what each term of the bound is for Gaussian pixels, so that weighted terms vary little.

    For t >= 2 as `timestep_density`; at t = 1 the decoder's term, the entropy of an 8-bit pixel that is known up to
    the error of the best prediction from x_1.
    """
    snr = process.schedule.log_snr.exp()
    terms = 0.5 * _gaussian_terms(snr)
    error = 1 / (snr[0].item() + 1 / PIXEL_VARIANCE)
    decoder = max(0.0, 0.5 * math.log(2 * math.pi * math.e * error * ((LEVELS - 1) / 2) ** 2))
    every = torch.cat((torch.tensor([decoder], dtype=torch.float64), terms))
    total = every.sum()
    shape = every / total if total > 0 else uniform_density(process)
    return (1 - EVEN_PART) * shape + EVEN_PART / process.timesteps


def timestep_density(process: GaussianDiffusion) -> Tensor:
    """The density over t = 2..T that the estimate of bits/dim draws from, float64 [T - 1].

    With the small variance, L_{t-1} is (SNR_{t-1} - SNR_t) / 2 times the squared error of the predicted x0 (Kingma
    et al. 2021, "Variational diffusion models", section 4). For Gaussian pixels of variance s^2 the best
    predictor's error is 1 / (SNR_t + 1 / s^2).
    """
    shape = _gaussian_terms(process.schedule.log_snr.exp())
    if len(shape) == 0:
        return shape
    return (1 - EVEN_PART) * shape / shape.sum() + EVEN_PART / len(shape)


def draw(density: Tensor, uniforms: Tensor) -> Tensor:
    """Timesteps, int64 in 1..T of the uniforms' shape, by the inverse of the density's cumulative sum.

    Rising uniforms give rising timesteps, so that stratified uniforms give stratified timesteps.
    """
    density = density.to(uniforms.device)
    # Rounding can leave the last sum just below 1.
    return torch.searchsorted(density.cumsum(0), uniforms, right=True).clamp(max=len(density) - 1) + 1


def importance(density: Tensor, t: Tensor) -> Tensor:
    """1 / (T q(t)): with these weights the mean over draws of t is that over all timesteps alike. float64 [N].

    ValueError for t outside 1..T.
    """
    t = checked_timesteps(t, len(density))
    return 1 / (len(density) * density.to(t.device)[t - 1])


def _gaussian_terms(snr: Tensor) -> Tensor:
    return (snr[:-1] - snr[1:]) / (snr[1:] + 1 / PIXEL_VARIANCE)
