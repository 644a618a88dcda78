"""The chance of an evaluation, keyed by what it is for."""

import numpy as np

from ddpm_core import noise


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """numpy's generator for one keyed purpose of an evaluation."""
    return np.random.default_rng(noise.key(seed, f"evaluate-{purpose}", *index))


def choose_images(count: int, n: int, seed: int) -> np.ndarray:
    """Indices of n images out of `count`, rising, drawn by the seed: a dataset may hold them class by class."""
    return np.sort(generator(seed, "bits-images").permutation(count)[:n])
