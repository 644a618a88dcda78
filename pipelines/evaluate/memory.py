"""Whether a model gives back what it was trained on: how near its images lie to training images.

How near is near? Held-out images tell, which are no copies: a twentieth of them lies within the threshold, and so may a
twentieth of a model's. The threshold is taken from one half of them, and their own rate is counted on the other. In
features an image that was shifted or touched up is near its original as well, in pixels there is no network to doubt.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.evaluate.chance import generator

NEAR = 0.05
"""Share of held-out images that count as near."""
_CANDIDATES = 4
"""Of each image, that are compared exactly: inner products, which are fast, tell near ones apart badly."""
_BLOCK = 256
_TRAIN_BLOCK = 8192


@dataclass(frozen=True)
class Nearest:
    """Of each of n images, the nearest training image."""

    index: NDArray[np.int64]
    distance: NDArray[np.float64]
    """Euclidean."""


def nearest(images: NDArray[np.generic], train: NDArray[np.generic]) -> Nearest:
    """Of images or features [n, ...] the nearest in train [m, ...], by brute force, in blocks. ValueError for none."""
    if not len(images) or not len(train):
        raise ValueError(f"{len(images)} images and {len(train)} training images: one or more of each are needed")
    found = [_nearest(images[start : start + _BLOCK], train) for start in range(0, len(images), _BLOCK)]
    return Nearest(np.concatenate([f.index for f in found]), np.concatenate([f.distance for f in found]))


def _nearest(images: NDArray[np.generic], train: NDArray[np.generic]) -> Nearest:
    x = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))
    best = torch.empty(len(x), 0)
    where = torch.empty(len(x), 0, dtype=torch.int64)
    for start in range(0, len(train), _TRAIN_BLOCK):
        block = train[start : start + _TRAIN_BLOCK]
        y = torch.from_numpy(block.reshape(len(block), -1).astype(np.float32))
        # |x|^2 is the same for all of an image's, and left out.
        rough = y.square().sum(1) - 2 * (x @ y.T)
        near, row = rough.topk(min(_CANDIDATES, len(y)), largest=False)
        best, where = torch.cat([best, near], 1), torch.cat([where, row + start], 1)
        best, column = best.topk(min(_CANDIDATES, best.shape[1]), largest=False)
        where = where.gather(1, column)
    candidates = where.numpy()
    exact = np.stack([_distance(images, train[column]) for column in candidates.T], axis=1)
    choice = exact.argmin(1)
    rows = np.arange(len(images))
    return Nearest(candidates[rows, choice], exact[rows, choice])


def _distance(a: NDArray[np.generic], b: NDArray[np.generic]) -> NDArray[np.float64]:
    difference = a.astype(np.float64) - b.astype(np.float64)
    return np.sqrt((difference**2).reshape(len(a), -1).sum(1))


@dataclass(frozen=True)
class Memory:
    """How many images lie near training images, and how many of the held-out ones do."""

    near: NDArray[np.float64]
    """1 for each of the model's images that does, 0 for the others."""
    own_rate: float
    """Of held-out images, by the threshold of the others."""
    threshold: float

    @property
    def rate(self) -> float:
        return float(self.near.mean())


def memory(ours: NDArray[np.float64], held_out: NDArray[np.float64], seed: int) -> Memory:
    """By distances to the nearest training image, of a model's images [n] and of held-out ones [m].

    ValueError for fewer than 2 held-out images.
    """
    if len(held_out) < 2:
        raise ValueError(f"2 held-out images or more are needed, not {len(held_out)}")
    order = generator(seed, "memory").permutation(len(held_out))
    half = len(order) // 2
    threshold = float(np.quantile(held_out[order[:half]], NEAR))
    own = float((held_out[order[half:]] <= threshold).mean())
    return Memory((ours <= threshold).astype(np.float64), own, threshold)
