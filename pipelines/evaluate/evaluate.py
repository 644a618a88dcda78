"""The scores of a model: pure functions of images, estimates and seeds. Who makes those, and where, is elsewhere's."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_core import GaussianDiffusion, bits_per_dim_estimate, content_keys, mean_interval
from ddpm_core.diffusion import Network
from pipelines.data.pixels import to_model
from pipelines.errors import Failed, UserError
from pipelines.evaluate.features import PREPROCESSING, FeatureNet, Pixels, torch_threads
from pipelines.evaluate.frechet import (
    Features,
    Statistics,
    bootstrap_spread,
    frechet_distance,
    generator,
    halvings,
    real_floor,
)
from pipelines.evaluate.scores import BITS_PER_DIM, FRECHET, Score

HELD_OUT = "held-out"
SPLITS = 50
REPLICATES = 200


def frechet_score(
    net: FeatureNet,
    samples: Pixels,
    held_out: Pixels,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    splits: int = SPLITS,
    replicates: int = REPLICATES,
    batch: int = 256,
) -> Score:
    """Frechet distance of samples uint8 [S, H, W, C] from held-out images uint8 [M, H, W, C], with its floor.

    Everything is at the same n = min(S, M // 2): in each of `splits` halvings of the held-out images, keyed by the
    seed, n random samples are taken against either half; the score is the mean. The floor is the mean distance
    between the two halves, of images that the feature network has not seen. The score of uniform noise, taken the
    same way, tells a blind network: it is recorded in floors.

    `provenance` holds what only the caller knows (dataset_digest, model_digest, ema, sampler, steps, sample_seed);
    n, features, preprocessing, split, floor and the rest are added. UserError where n would be below 2.
    """
    n = min(len(samples), len(held_out) // 2)
    if n < 2:
        raise UserError(
            f"{len(samples)} samples and {len(held_out)} held-out images are too few for a score, "
            "which takes 2 and 4: raise sample.n or data.held_out"
        )
    noise = uniform_noise((n, *held_out.shape[1:]), seed)
    # On one thread: the score's bits do not depend on how many the caller has.
    with torch_threads(1):
        ours, real, blind = (net.features(images, batch) for images in (samples, held_out, noise))
        floor = float(real_floor(real, n, seed, splits).mean())
        value, worst = (_against_halves(features, real, n, seed, splits) for features in (ours, blind))
        low, high = bootstrap_spread(ours, real, seed, replicates)
    added = {
        "n": n,
        "samples": len(samples),
        "features_digest": net.digest,
        "preprocessing": PREPROCESSING,
        "split": HELD_OUT,
        "seed": seed,
        "splits": splits,
        "floor": floor,
        # No floor where all held-out images are the same one; JSON has no infinity.
        "noise_in_floors": worst / floor if floor > 0 else None,
    }
    return Score(FRECHET, value, (max(0.0, value + low), value + high), {**provenance, **added})


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
    device = next((p.device for p in model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    parts = [
        bits_per_dim_estimate(
            process, model, to_model(images[start : start + batch]).to(device), seed, timesteps_per_image
        )
        for start in range(0, len(images), batch)
    ]
    estimates = np.fromiter(chain.from_iterable(part.tolist() for part in parts), dtype=np.float64)
    if not np.isfinite(estimates).all():
        raise Failed("the model answers NaN to held-out images: it diverged, and has no bits/dim")
    return estimates


def uniform_noise(shape: tuple[int, ...], seed: int) -> Pixels:
    """Images of nothing: uint8, every pixel uniform in 0..255, keyed by the seed."""
    return generator(seed, "noise").integers(256, size=shape, dtype=np.uint8)


def _against_halves(features: Features, real: Features, n: int, seed: int, splits: int) -> float:
    """Mean distance of n random rows of `features` from either half of the real ones, over the halvings."""
    distances = []
    for split, halves in enumerate(halvings(len(real), n, seed, splits)):
        taken = generator(seed, "subset", split).permutation(len(features))[:n]
        ours = Statistics.of(features[taken])
        distances += [frechet_distance(ours, Statistics.of(real[half])) for half in halves]
    return float(np.mean(distances))
