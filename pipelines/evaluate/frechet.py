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
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.evaluate.chance import REPLICATES, generator

Features = NDArray[np.float64]

SPLITS = 50
"""Halvings that a distance is a mean over, at most."""
WORK = 50_000_000_000
"""Multiplications, or so, that the halvings may take, and as many the replicates: some twenty seconds."""
_NARROW = 1.5
"""Images for each feature, from which on the way by covariances is the shorter one."""


class _Centred(NamedTuple):
    mean: torch.Tensor
    centred: torch.Tensor
    """[n, d], over the root of n - 1: its square is the covariance."""


def _centred(features: Features) -> _Centred:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of two images or more [n, d] are needed, not {list(features.shape)}")
    if not np.isfinite(features).all():
        raise ValueError("the features are not all finite")
    values = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
    mean = values.mean(dim=0)
    return _Centred(mean, (values - mean) / (len(values) - 1) ** 0.5)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the distance is taken from: n images' mean [d] and unbiased covariance [d, d] of d features, float64."""

    n: int
    mean: Features
    covariance: Features

    @staticmethod
    def of(features: Features) -> "Statistics":
        """Of features [n, d]. ValueError for fewer than two images, or values that are not finite."""
        found = _centred(features)
        return Statistics(len(features), found.mean.numpy(), (found.centred.T @ found.centred).numpy())

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


def distance_of(a: Features, b: Features) -> float:
    """The squared Frechet distance of two sets of features [n, d] and [m, d]. ValueError as by `Statistics.of`.

    Of fewer images than features, or hardly more, the covariances are left out: with centred features X and Y,
    tr (S T)^(1/2) is the sum of the singular values of X Y^T / ((n - 1) (m - 1))^(1/2), a matrix of n x m.
    """
    if min(len(a), len(b)) >= _NARROW * a.shape[1]:
        return frechet_distance(Statistics.of(a), Statistics.of(b))
    x, y = (_centred(features) for features in (a, b))
    overlap = float(torch.linalg.svdvals(x.centred @ y.centred.T).sum())
    spread = float(x.centred.square().sum() + y.centred.square().sum()) - 2 * overlap
    return max(0.0, float((x.mean - y.mean).square().sum()) + spread)


def frechet_effort(n: int, d: int) -> tuple[int, int]:
    """Halvings and replicates that distances of n images with d features are worth: fewer where each is dear."""
    work = n * d * min(n, d)
    return min(SPLITS, max(2, WORK // work)), min(REPLICATES, max(20, WORK // work * 2))


def halvings(count: int, n: int, seed: int, splits: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """`splits` random pairs of disjoint index sets of size n out of `count`, keyed by the seed.

    ValueError where 2 n exceeds the count.
    """
    if not 2 <= n <= count // 2:
        raise ValueError(f"two sets of {n} do not fit into {count} images")
    for split in range(splits):
        order = generator(seed, "halving", split).permutation(count)
        yield order[:n], order[n : 2 * n]
