"""The Frechet distance between two sets of images, of Gaussians fitted to their features, and its floor.

Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6:
|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Two finite sets of real images are not at distance 0: what the
estimate of d features from n images adds falls as 1/n. A distance says something only beside that of real
images from real images at the same n, the floor.

The algebra is torch's, because torch's threads can be set from within: numpy's, when the cores are shared, spend
ten times as long on matrices as small as these, and their number would show in the last bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.evaluate.chance import generator

Features = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the distance is taken from: n images' mean [d] and unbiased covariance [d, d] of d features, float64."""

    n: int
    mean: Features
    covariance: Features

    @staticmethod
    def of(features: Features) -> "Statistics":
        """Of features [n, d]. ValueError for fewer than two images, or values that are not finite."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features of two images or more [n, d] are needed, not {list(features.shape)}")
        if not np.isfinite(features).all():
            raise ValueError("the features are not all finite")
        values = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
        mean = values.mean(dim=0)
        centred = values - mean
        covariance = centred.T @ centred / (len(values) - 1)
        return Statistics(len(values), mean.numpy(), covariance.numpy())

    @cached_property
    def factor(self) -> torch.Tensor:
        """A with A A^T = covariance, by eigen-decomposition; eigenvalues that rounding made negative count as 0."""
        values, vectors = torch.linalg.eigh(torch.from_numpy(self.covariance))
        return vectors * values.clamp(min=0).sqrt()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Frechet distance of two Gaussians; 0 or more, of features squared.

    With S = A A^T and T = B B^T, the eigenvalues of S T are the squared singular values of A^T B, so that
    tr (S T)^(1/2) is their sum: real, exact to rounding, and at ease with covariances that are not of full rank.
    """
    overlap = float(torch.linalg.svdvals(a.factor.T @ b.factor).sum())
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(((a.mean - b.mean) ** 2).sum() + spread))


def halvings(count: int, n: int, seed: int, splits: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """`splits` random pairs of disjoint index sets of size n out of `count`, keyed by the seed.

    ValueError where 2 n exceeds the count.
    """
    if not 2 <= n <= count // 2:
        raise ValueError(f"two sets of {n} do not fit into {count} images")
    for split in range(splits):
        order = generator(seed, "halving", split).permutation(count)
        yield order[:n], order[n : 2 * n]


def bootstrap_spread(a: Features, b: Features, seed: int, replicates: int) -> tuple[float, float]:
    """How far the distance between two sets would move with other images: 2.5 % and 97.5 % points, around 0.

    Both sets are drawn again with replacement, keyed by the seed (Efron 1979). Repeated images make every
    replicate's distance larger than the sets' own, so that its percentiles are no interval; their deviations from
    the replicates' mean are, once added to the estimate.
    """
    distances = []
    for replicate in range(replicates):
        random = generator(seed, "bootstrap", replicate)
        again = (Statistics.of(x[random.integers(len(x), size=len(x))]) for x in (a, b))
        distances.append(frechet_distance(*again))
    low, high = np.quantile(np.array(distances) - np.mean(distances), [0.025, 0.975])
    return float(low), float(high)
