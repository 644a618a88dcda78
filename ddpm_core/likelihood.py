"""Bits per dimension: an upper bound on the negative log-likelihood of 8-bit images.

The variational bound of Ho et al. 2020 (DDPM), equation 5, term by term. 8-bit data is assumed: x0 lies on the
grid -1, -1 + 2/255, ..., 1. Data with fewer levels (the bundled digits have 17) is given a probability mass per
8-bit level all the same, which distorts its bits per dimension: compare models on such data, but not with other
data.

All noise is keyed by (seed, the image's content, draw), so that an image's value depends neither on its place in
the data nor on what else is in its batch. (Bits of the network's output may depend on the batch's size.)
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import losses, noise
from ddpm_core.diffusion import GaussianDiffusion, Network, evaluating

# Part of the estimate's draws that is spread evenly over the timesteps, whatever the schedule says.
EVEN_PART = 0.1

# Variance of the pixels, in units of [-1, 1]^2, that `timestep_density` reckons with. Tried on digits with 8 calls
# an image: anything from 0.2 to 1 leaves an image's estimate an error of about 0.33 bits/dim, where images differ
# by 0.62 and evenly spread timesteps would err by 9.
PIXEL_VARIANCE = 0.25


class BitsPerDim(NamedTuple):
    """total [N] = prior [N] + the sum of terms [N, T]; terms[:, 0] is the decoder's L_0, terms[:, t-1] is L_{t-1}.

    float64, bits per dimension.
    """

    total: Tensor
    terms: Tensor
    prior: Tensor


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def bits_per_dim(process: GaussianDiffusion, model: Network, x0: Tensor, seed: int, clip_x0: bool = True) -> BitsPerDim:
    """Every term of the bound, each with one draw of noise an image: T network calls.

    x0 [N, C, H, W] in [-1, 1], else ValueError. `clip_x0`: of the model that clips its predicted x0.
    """
    keys = [noise.key(seed, "bits-per-dim", content) for content in content_keys(x0)]
    with evaluating(model):
        columns = [
            _term(process, model, x0, torch.full((len(x0),), t, device=x0.device), keys, t, clip_x0)
            for t in range(1, process.timesteps + 1)
        ]
        prior = losses.prior_term(process, x0)
    terms, prior = torch.stack(columns, dim=1).clone(), prior.clone()
    return BitsPerDim(prior + terms.sum(1), terms, prior)


def bits_per_dim_estimate(
    process: GaussianDiffusion,
    model: Network,
    x0: Tensor,
    seed: int,
    timesteps_per_image: int,
    content_keys: Sequence[int] | None = None,
    clip_x0: bool = True,
) -> Tensor:
    """Unbiased estimates of the images' bits per dimension, float64 [N], in `timesteps_per_image` calls.

    The prior is exact. t = 1, the decoder's term and usually the largest by far, is always taken, with weight 1.
    The other k - 1 timesteps come from 2..T by `timestep_density` q: its mass is cut into k - 1 equal strata and
    one t drawn in each; each term counts with 1 / ((k - 1) q(t)). For any q above 0 this is unbiased; the q chosen
    is roughly in proportion to the terms, so that the weighted terms of an image vary little.

    `content_keys` are those of the function of that name, where they are known already. ValueError unless
    timesteps_per_image is in 2..T.
    """
    count = timesteps_per_image
    if not min(2, process.timesteps) <= count <= process.timesteps:
        raise ValueError(f"timesteps_per_image must be in 2..{process.timesteps}, not {count}")
    contents = _content_keys(x0) if content_keys is None else content_keys
    if len(contents) != len(x0):
        raise ValueError(f"one content key an image is needed: {len(contents)} for {len(x0)} images")
    keys = [noise.key(seed, "bits-per-dim-estimate", content) for content in contents]
    with evaluating(model):
        total = losses.prior_term(process, x0)
        ones = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
        total = total + _term(process, model, x0, ones, keys, 1, clip_x0)
        if count > 1:
            density = timestep_density(process)
            for stratum, t in enumerate(_stratified(density, seed, contents, count - 1).unbind(1), start=2):
                weight = 1 / ((count - 1) * density[t - 2])
                term = _term(process, model, x0, t.to(x0.device), keys, stratum, clip_x0)
                total = total + weight.to(x0.device) * term
    return total.clone()


def timestep_density(process: GaussianDiffusion) -> Tensor:
    """The density over t = 2..T that the estimate draws from, float64 [T - 1].

    With the small variance, L_{t-1} is (SNR_{t-1} - SNR_t) / 2 times the squared error of the predicted x0 (Kingma
    et al. 2021, "Variational diffusion models", section 4). For Gaussian pixels of variance s^2 the best
    predictor's error is 1 / (SNR_t + 1 / s^2). The density follows from the schedule alone, without a history of
    losses; a tenth is spread evenly, for models that err elsewhere.
    """
    snr = process.schedule.log_snr.exp()
    shape = (snr[:-1] - snr[1:]) / (snr[1:] + 1 / PIXEL_VARIANCE)
    return (1 - EVEN_PART) * shape / shape.sum() + EVEN_PART / len(shape)


def mean_interval(estimates: Tensor) -> Interval:
    """Mean and 95 % interval over images of per-image estimates [N], N >= 2, by the normal approximation.

    The interval covers both the choice of images and the draws of noise. Summed exactly, so that the order of the
    images does not matter. ValueError for fewer than two.
    """
    values = estimates.double().flatten().tolist()
    if len(values) < 2:
        raise ValueError(f"an interval needs two images or more, not {len(values)}")
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = 1.96 * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def content_keys(x0: Tensor) -> list[int]:
    """A 64-bit key of each image's content: a hash of its shape and 8-bit pixels. ValueError outside [-1, 1]."""
    low, high = (float(bound) for bound in x0.aminmax()) if x0.numel() else (0.0, 0.0)
    if not (low >= -1 - 1e-6 and high <= 1 + 1e-6):
        raise ValueError(f"x0 must lie in [-1, 1], not in [{low}, {high}]")
    pixels = ((x0.double() + 1) * ((losses.LEVELS - 1) / 2)).round().to("cpu", torch.uint8)
    keys = []
    for image in pixels:
        content = repr(list(image.shape)).encode() + bytes(image.flatten().tolist())
        keys.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
    return keys


_content_keys = content_keys  # under a name that the parameter of the same name does not hide


def _term(
    process: GaussianDiffusion, model: Network, x0: Tensor, t: Tensor, keys: list[int], counter: int, clip_x0: bool
) -> Tensor:
    """The bound's term at t [N], with noise drawn at (keys, counter)."""
    eps = noise.normal(keys, x0.shape[1:], counter, device=x0.device)
    x_t = process.q_sample(x0, t, eps.to(x0.dtype))
    return losses.vlb_term(process, x0, x_t, t, process.call(model, x_t, t), clip_x0)


def _stratified(density: Tensor, seed: int, contents: Sequence[int], count: int) -> Tensor:
    """One t of 2..T in each of `count` strata of equal mass, int64 [N, count]."""
    keys = [noise.key(seed, "bits-per-dim-timesteps", content) for content in contents]
    position = (torch.arange(count) + noise.uniform(keys, count)) / count
    # Rounding can leave the last sum just below 1.
    return torch.searchsorted(density.cumsum(0), position, right=True).clamp(max=len(density) - 1) + 2
