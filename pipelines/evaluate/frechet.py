"""Frechet distance between two sets of features, what real images score against real ones, and its spread.

Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium": the distance
between two Gaussians of the sets' means and covariances (Dowson and Landau 1982). It is biased upwards by about 1 / n:
a value means nothing without n and without the floor, real against real, at the same n.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm_core import noise

Features = NDArray[np.float64]

SPLITS = 10
"""Random halvings of the real images that every figure is averaged over."""
RESAMPLES = 200


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of n features, float64."""

    n: int
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @staticmethod
    def of(features: Features) -> "Statistics":
        """Of features [n, D], n >= 2, else ValueError."""
        if len(features) < 2:
            raise ValueError(f"a covariance needs two images or more, not {len(features)}")
        return Statistics(
            len(features), features.mean(0), np.cov(features, rowvar=False).reshape([features.shape[1]] * 2)
        )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), squared feature units.

    tr((C_a C_b)^(1/2)) is the sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is
    symmetric: no complex numbers, and no trouble where a covariance is rank-deficient.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(distance, 0.0))


@dataclass(frozen=True)
class AgainstHalves:
    """Distances to random halves of the real images, each averaged over the halvings; n images on every side."""

    n: int
    value: float
    floor: float
    """One half of the real images against the other."""
    interval: tuple[float, float]
    """95 % of the values under resampling of the images on both sides."""


def against_halves(drawn: Features, real: Features, seed: int, splits: int = SPLITS) -> AgainstHalves:
    """Compare n drawn images with halves of 2n (or 2n + 1) real ones. ValueError where the numbers do not fit."""
    n = len(real) // 2
    if len(drawn) != n:
        raise ValueError(f"{len(real)} real images have halves of {n}: draw as many, not {len(drawn)}")
    ours = Statistics.of(drawn)
    values, floors = [], []
    for split in range(splits):
        order = _permutation(noise.key(seed, "halves", split), len(real))
        one, other = Statistics.of(real[order[:n]]), Statistics.of(real[order[n : 2 * n]])
        floors.append(frechet_distance(one, other))
        values += [frechet_distance(ours, one), frechet_distance(ours, other)]
    value = float(np.mean(values))
    return AgainstHalves(n, value, float(np.mean(floors)), _spread(value, drawn, real, n, seed))


def _spread(value: float, drawn: Features, real: Features, n: int, seed: int) -> tuple[float, float]:
    """The bootstrap's quantiles about its own mean, moved to the value: resampling itself biases upwards."""
    boot = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = noise.integers([noise.key(seed, "bootstrap", i)], 2 * n, 0, n - 1)[0].numpy()
        others = noise.integers([noise.key(seed, "bootstrap-real", i)], n, 0, len(real) - 1)[0].numpy()
        boot[i] = frechet_distance(Statistics.of(drawn[rows[:n]]), Statistics.of(real[others]))
    low, high = np.quantile(boot, [0.025, 0.975]) - boot.mean()
    return value + float(low), value + float(high)


def _permutation(key: int, n: int) -> NDArray[np.int64]:
    draws = noise.bits([key], n)[0].numpy()
    return np.argsort(draws, kind="stable")
