"""The chance of an evaluation, keyed by what it is for, and what may be said in spite of it: intervals, all of 95 %."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ddpm_core import noise

Rows = NDArray[np.int64]
Draw = tuple[Rows, Rows]
"""Which of our images, and which real ones, are held against each other."""
Interval = tuple[float, float]
REPLICATES = 200
"""Of an interval, where each costs little."""
_Z = float(stats.norm.ppf(0.975))


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """numpy's generator for one keyed purpose of an evaluation."""
    return np.random.default_rng(noise.key(seed, f"evaluate-{purpose}", *index))


def choose_images(count: int, n: int, seed: int) -> np.ndarray:
    """Indices of n images out of `count`, rising, drawn by the seed: a dataset may hold them class by class."""
    return np.sort(generator(seed, "bits-images").permutation(count)[:n])


def halves_of_both(ours: int, real: int, seed: int, replicates: int) -> Iterator[Draw]:
    """A random half of `ours` images and one of `real` images, so often, keyed by the seed."""
    random = generator(seed, "halves")
    for _ in range(replicates):
        yield random.permutation(ours)[: ours // 2], random.permutation(real)[: real // 2]


def jackknife_interval(value: float, replicates: NDArray[np.float64]) -> Interval:
    """Interval of an estimate by the same estimate from halves of its images [replicates, two or more].

    The delete-d jackknife (Shao and Wu 1989, "A general theory for jackknife variance estimation"): where d is half of
    the images, the halves' estimates spread around their own mean as the estimate does around the truth. No image is
    there twice, as it would be in a bootstrap, where it would be its own nearest neighbour, and make every distance
    larger. Of their spread, not their quantiles: there are as few as 20, whose quantiles would be the outermost two.
    """
    half = float(stats.t.ppf(0.975, len(replicates) - 1) * replicates.std(ddof=1))
    return value - half, value + half


def share_interval(count: int, n: int) -> Interval:
    """Interval of a share of which `count` of n independent images were seen (Wilson 1927).

    At 0 of n and at n of n it still has a width: what was not seen may yet be.
    """
    found = stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def never_sure(interval: Interval, n: int) -> Interval:
    """Of a share of n images: cut off at 0 and 1, and wide enough that no n images make it certain.

    Where all replicates agree, on 0 or on 1, they have no spread: there it is Wilson's interval.
    """
    low, high = interval
    rest = _Z**2 / (n + _Z**2)
    return max(0.0, min(low, 1 - rest)), min(1.0, max(high, rest))
