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
from ddpm_core.checks import NotFiniteError, check_images, checked_integer
from ddpm_core.diffusion import GaussianDiffusion, Network, evaluating
from ddpm_core.timesteps import draw, timestep_density


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


class Profile(NamedTuple):
    """What a model does at every timestep: the bound's terms, and the mean squared errors of what it predicts.

    x0_mse and eps_mse are float64 [N, T], the means over C, H, W of the squared errors of the predicted x0 (clipped,
    if clipping is on) and of the eps that goes with it, at the same draws of noise as the terms.
    """

    bits: BitsPerDim
    x0_mse: Tensor
    eps_mse: Tensor


class RateDistortion(NamedTuple):
    """Progressive lossy coding (DDPM, section 4.3 and fig. 5): after the steps T..t+1 the receiver has x_t.

    rate float64 [T], bits per dimension: index t - 1 is the prior and the terms of the steps T..t+1, what it takes to
    send x_t; falling in t. distortion [T]: the root mean squared error, in 8-bit levels (0..255), of the x0 predicted
    from x_t.
    """

    rate: Tensor
    distortion: Tensor


def bits_per_dim(process: GaussianDiffusion, model: Network, x0: Tensor, seed: int, clip_x0: bool = True) -> BitsPerDim:
    """Every term of the bound, each with one draw of noise an image: T network calls.

    x0 floating point [N, C, H, W] in [-1, 1], else ValueError. `clip_x0`: of the model that clips its predicted x0. A
    network that answers NaN has NaN for its terms.
    """
    return profile(process, model, x0, seed, clip_x0).bits


def profile(process: GaussianDiffusion, model: Network, x0: Tensor, seed: int, clip_x0: bool = True) -> Profile:
    """`bits_per_dim` with the errors at every timestep, from the same T network calls."""
    keys = [noise.key(seed, "bits-per-dim", content) for content in content_keys(x0)]
    terms, x0_mse, eps_mse = [], [], []
    with evaluating(model):
        for step in range(1, process.timesteps + 1):
            t = torch.full((len(x0),), step, device=x0.device)
            x_t, eps = _noised(process, x0, t, keys, step)
            wide, truth = x_t.double(), x0.double()
            reverse = process.reverse(wide, t, process.call(model, x_t, t), clip_x0)
            terms.append(losses.reverse_term(process, truth, wide, t, reverse))
            rest = (wide - process.at("signal_rate", t, wide) * reverse.x0) / process.at("noise_rate", t, wide)
            x0_mse.append((reverse.x0 - truth).square().flatten(1).mean(1))
            eps_mse.append((rest - eps.double()).square().flatten(1).mean(1))
        prior = losses.prior_term(process, x0)
    # Copies made outside inference mode can be used anywhere.
    columns, prior = [torch.stack(each, dim=1).clone() for each in (terms, x0_mse, eps_mse)], prior.clone()
    return Profile(BitsPerDim(prior + columns[0].sum(1), columns[0], prior), columns[1], columns[2])


def rate_distortion(profile: Profile) -> RateDistortion:
    """The curve of a profile, the mean over its images."""
    terms, prior = profile.bits.terms.mean(0), profile.bits.prior.mean()
    later = terms.flip(0).cumsum(0).flip(0) - terms  # of the steps after each
    distortion = profile.x0_mse.mean(0).sqrt() * (losses.LEVELS - 1) / 2
    return RateDistortion(prior + later, distortion)


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

    `content_keys` are those of the function of that name, where they are known already. ValueError unless x0 is
    floating point in [-1, 1] and timesteps_per_image in 2..T.
    """
    count = checked_integer(timesteps_per_image, "timesteps_per_image")
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


def mean_interval(estimates: Tensor, content_keys: Sequence[int] | None = None) -> Interval:
    """Mean and 95 % interval over images of per-image estimates [N], N >= 2, by the normal approximation.

    The interval covers both the choice of images and the draws of noise. Summed exactly, so that the order of the
    images does not matter. Equal images share their noise, and count as one draw of the interval where their
    `content_keys` are given (the variance of a mean of clusters). ValueError for fewer than two different images, and
    for estimates that are not finite.
    """
    values = estimates.double().flatten().tolist()
    if not all(map(math.isfinite, values)):
        raise NotFiniteError("estimates must be finite numbers: a network that diverged has none")
    keys = range(len(values)) if content_keys is None else content_keys
    if len(keys) != len(values):
        raise ValueError(f"one content key an estimate is needed: {len(keys)} for {len(values)}")
    mean = math.fsum(values) / len(values) if values else 0.0
    clusters: dict[int, list[float]] = {}
    for value, key in zip(values, keys, strict=True):
        clusters.setdefault(key, []).append(value - mean)
    count = len(clusters)
    if count < 2:
        raise ValueError(f"an interval needs two images or more, not {count}")
    squares = math.fsum(math.fsum(cluster) ** 2 for cluster in clusters.values())
    half = 1.96 * math.sqrt(squares / (count - 1) / len(values) * (count / len(values)))
    return Interval(mean, mean - half, mean + half)


def content_keys(x0: Tensor) -> list[int]:
    """A 64-bit key of each image's content: a hash of its shape and 8-bit pixels.

    ValueError outside [-1, 1], for NaN, and for pixels that are not floating point.
    """
    check_images(x0)
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
    x_t, _ = _noised(process, x0, t, keys, counter)
    return losses.vlb_term(process, x0, x_t, t, process.call(model, x_t, t), clip_x0)


def _noised(process: GaussianDiffusion, x0: Tensor, t: Tensor, keys: list[int], counter: int) -> tuple[Tensor, Tensor]:
    """x_t and its noise, drawn at (keys, counter)."""
    eps = noise.normal(keys, x0.shape[1:], counter, device=x0.device).to(x0.dtype)
    return process.q_sample(x0, t, eps), eps


def _stratified(density: Tensor, seed: int, contents: Sequence[int], count: int) -> Tensor:
    """One t of 2..T in each of `count` strata of equal mass, int64 [N, count]."""
    keys = [noise.key(seed, "bits-per-dim-timesteps", content) for content in contents]
    position = (torch.arange(count) + noise.uniform(keys, count)) / count
    return draw(density, position) + 1
