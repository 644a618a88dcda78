"""Scores from images, features and estimates: pure functions; who makes their inputs is the job's concern."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_core import GaussianDiffusion, UNet, bits_per_dim_estimate, mean_interval, noise
from pipelines.data.pixels import to_model
from pipelines.evaluate.features import PREPROCESSING, FeatureNet
from pipelines.evaluate.frechet import SPLITS, against_halves
from pipelines.evaluate.scores import Score

Pixels = NDArray[np.uint8]


def frechet_score(
    net: FeatureNet, drawn: Pixels, held_out: Pixels, *, seed: int, provenance: Mapping[str, Any]
) -> Score:
    """Frechet distance of drawn images uint8 [n, H, W, C] to halves of the held-out ones [2n or 2n + 1, H, W, C].

    Beside it, from the same halves: the floor (real against real) and, so that features which see nothing show, how
    many floors uniform noise scores.
    """
    real = net.features(held_out)
    result = against_halves(net.features(drawn), real, seed)
    blind = against_halves(net.features(_noise_images(drawn.shape, seed)), real, seed)
    return Score(
        name="frechet",
        value=result.value,
        interval=result.interval,
        note=f"{result.value / result.floor:.2f} floors; floor {result.floor:.4g}, n = {result.n}, held-out images",
        provenance={
            **provenance,
            "n": result.n,
            "halvings": SPLITS,
            "split": "held-out",
            "features_digest": net.digest,
            "features_width": net.config.width,
            "preprocessing": PREPROCESSING,
            "seed": seed,
            "floor": result.floor,
            "noise_floors": blind.value / result.floor,
        },
    )


def estimate_bits(
    process: GaussianDiffusion, model: UNet, images: Pixels, seed: int, timesteps_per_image: int, batch: int
) -> NDArray[np.float64]:
    """Unbiased estimates of each image's bits/dim [N], for images uint8 [N, H, W, C]."""
    parts = [
        bits_per_dim_estimate(process, model, to_model(images[start : start + batch]), seed, timesteps_per_image)
        for start in range(0, len(images), batch)
    ]
    return np.concatenate([part.numpy() for part in parts])


def bits_score(
    estimates: NDArray[np.float64], *, seed: int, timesteps_per_image: int, provenance: Mapping[str, Any]
) -> Score:
    """Mean bits/dim of held-out images from per-image estimates [N], with its 95 % interval."""
    import torch

    mean, low, high = mean_interval(torch.from_numpy(estimates))
    return Score(
        name="bits_per_dim",
        value=mean,
        interval=(low, high),
        note=f"estimate, {len(estimates)} held-out images, {timesteps_per_image} timesteps each",
        provenance={
            **provenance,
            "n": len(estimates),
            "split": "held-out",
            "timesteps_per_image": timesteps_per_image,
            "seed": seed,
            "levels": 256,
        },
    )


def _noise_images(shape: tuple[int, ...], seed: int) -> Pixels:
    draws = noise.bits([noise.key(seed, "noise-images")], int(np.prod(shape)))[0] >> 24
    return draws.numpy().astype(np.uint8).reshape(shape)
