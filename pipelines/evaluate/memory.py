"""Whether a model gives back what it was trained on: how near its images lie to training images.

How near is near? Held-out images tell, which are no copies: a twentieth of them lies within the threshold, and so may a
twentieth of a model's. Their own rate is that of one half by the threshold of the other, both ways, over many halvings.
In features an image that was shifted or touched up is near its original too, in pixels there is no network to doubt.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.evaluate.chance import REPLICATES, Interval, generator, never_sure

NEAR = 0.05
"""Share of held-out images that count as near."""
SPLITS = 50
"""Halvings of the held-out images that their own rate is a mean over."""
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

    rate: float
    """Share of the model's images that do."""
    interval: Interval
    """Of the rate, with the chance of the threshold."""
    own_rate: float
    """Share of held-out images, by thresholds of others."""
    threshold: float


def memory(ours: NDArray[np.float64], held_out: NDArray[np.float64], seed: int) -> Memory:
    """By distances to the nearest training image, of a model's images [n] and of held-out ones [m].

    The interval is by bootstrap of both (Efron 1979): 5 % of the held-out images decide the threshold, and other ones
    would have given another. ValueError for fewer than 2 held-out images.
    """
    if len(held_out) < 2:
        raise ValueError(f"2 held-out images or more are needed, not {len(held_out)}")
    own, rates = [], []
    random = generator(seed, "memory")
    for _ in range(SPLITS):
        order = random.permutation(len(held_out))
        parts = held_out[order[: len(order) // 2]], held_out[order[len(order) // 2 :]]
        own += [_rate(part, _threshold(other)) for part, other in (parts, parts[::-1])]
    for _ in range(REPLICATES):
        again, others = (x[random.integers(len(x), size=len(x))] for x in (ours, held_out))
        rates.append(_rate(again, _threshold(others)))
    low, high = np.quantile(rates, [0.025, 0.975])
    threshold = _threshold(held_out)
    rate = _rate(ours, threshold)
    interval = never_sure((min(rate, float(low)), max(rate, float(high))), len(ours))
    return Memory(rate, interval, float(np.mean(own)), threshold)


def _threshold(held_out: NDArray[np.float64]) -> float:
    # Another such image lies below the k-th of m with a chance of k / (m + 1): by this rule, unlike numpy's usual one,
    # it is near with a chance of NEAR, unless there are fewer than 19. (Five times as fast as np.quantile.)
    last = len(held_out) - 1
    place = max(NEAR * (len(held_out) + 1) - 1, 0.0)
    below = int(place)
    ordered = np.partition(held_out, (below, min(below + 1, last)))
    return float(ordered[below] + (place - below) * (ordered[min(below + 1, last)] - ordered[below]))


def _rate(distances: NDArray[np.float64], threshold: float) -> float:
    return float((distances <= threshold).mean())
