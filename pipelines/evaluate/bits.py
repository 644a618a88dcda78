"""The likelihood of a model: pure functions of images, estimates and seeds. Who makes those is elsewhere's."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_core import GaussianDiffusion, bits_per_dim, bits_per_dim_estimate, content_keys, mean_interval
from ddpm_core.diffusion import Network
from pipelines.data.pixels import to_model
from pipelines.errors import Failed
from pipelines.evaluate.features import PREPROCESSING, Pixels
from pipelines.evaluate.scores import BITS_PER_DIM, Score
from pipelines.evaluate.sets import HELD_OUT


def bits_score(estimates: NDArray[np.float64], images: Pixels, *, seed: int, provenance: Mapping[str, Any]) -> Score:
    """Mean bits/dim of per-image estimates [N] on held-out images uint8 [N, H, W, C], with its interval over images and
    draws, of which copies of an image are one.

    `seed` and `provenance` say how the estimates were made; they are recorded. ValueError for fewer than two images.
    """
    mean, low, high = mean_interval(torch.from_numpy(estimates), content_keys(to_model(images)))
    added = {"n": len(estimates), "preprocessing": PREPROCESSING, "split": HELD_OUT, "seed": seed}
    return Score(BITS_PER_DIM, mean, (low, high), {**provenance, **added})


def estimate_bits(
    process: GaussianDiffusion,
    model: Network,
    images: Pixels,
    seed: int,
    timesteps_per_image: int,
    batch: int = 64,
) -> NDArray[np.float64]:
    """Unbiased estimates of bits/dim, float64 [N], of images uint8 [N, H, W, C]: `timesteps_per_image` calls each.

    The noise is keyed by (seed, the image's content); bits may depend on `batch`, and on where batches begin. Failed
    where the network answers NaN.
    """
    device = _device(model)
    parts = [
        bits_per_dim_estimate(
            process, model, to_model(images[start : start + batch]).to(device), seed, timesteps_per_image
        )
        for start in range(0, len(images), batch)
    ]
    return _finite(np.fromiter(chain.from_iterable(part.tolist() for part in parts), dtype=np.float64))


def exact_bits(process: GaussianDiffusion, model: Network, images: Pixels, seed: int) -> NDArray[np.float64]:
    """Bits/dim [N] of images uint8 [N, H, W, C], every term of the bound with one draw of noise: T calls an image.

    Noise and errors as by `estimate_bits`.
    """
    return _finite(bits_per_dim(process, model, to_model(images).to(_device(model)), seed).total.cpu().numpy())


def _device(model: Network) -> torch.device | None:
    return next((p.device for p in model.parameters()), None) if isinstance(model, torch.nn.Module) else None


def _finite(bits: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(bits).all():
        raise Failed("the model answers NaN to held-out images: it diverged, and has no bits/dim")
    return bits
