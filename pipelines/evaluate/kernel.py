"""The kernel distance between two sets of images (KID), an unbiased estimate at any number of them.

Binkowski et al. 2018, "Demystifying MMD GANs", section 3.2 and equation 4: the squared maximum mean discrepancy of the
features under the kernel k(x, y) = (x . y / d + 1)^3. Two sets of real images are at 0 on average, and single values
may lie below it. Many subsets of the same images are scored at once, from kernels that are worked out once, in blocks.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_core import noise
from pipelines.evaluate.chance import Draw, Rows
from pipelines.evaluate.frechet import Features

SUBSETS = 100
SUBSET = 1000
"""Most images of a subset, as is usual for the spread."""
_BLOCK = 2**21
"""Kernels at a time."""


def kernel_distance(a: Features, b: Features) -> float:
    """The estimate from all images of two sets of features [n, d] and [m, d]. ValueError for fewer than two images."""
    return float(kernel_distances(a, b, [(np.arange(len(a)), np.arange(len(b)))])[0])


def kernel_distances(ours: Features, real: Features, draws: Sequence[Draw]) -> NDArray[np.float64]:
    """Estimates [draws], each of some of our images [S, d] and some of the real ones [M, d]. ValueError as above."""
    if min(len(rows) for draw in draws for rows in draw) < 2:
        raise ValueError("two images or more of each are needed")
    x, y = (torch.from_numpy(np.ascontiguousarray(s, dtype=np.float64)) for s in (ours, real))
    u, v = (_counts([draw[side] for draw in draws], len(s)) for side, s in enumerate((x, y)))
    between = _between(x, y, u, v) / (u.sum(1) * v.sum(1))
    found: NDArray[np.float64] = (_within(x, u) + _within(y, v) - 2 * between).numpy()
    return found


def kernel_spread(a: Features, b: Features, seed: int, size: int) -> float:
    """Standard deviation of torchmetrics' estimates from 100 random subsets of so many images of either set."""
    from torchmetrics.image.kid import KernelInceptionDistance  # half a second, and only those who score pay it

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps the features, which are here anyway
        torch.manual_seed(noise.key(seed, "kernel-subsets"))  # it takes the global generator
        metric = KernelInceptionDistance(_AsTheyAre(), subsets=SUBSETS, subset_size=size)
        for features, real in ((a, True), (b, False)):
            metric.update(torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64)), real=real)
        _, deviation = metric.compute()
    return float(deviation)


def subset_size(n: int) -> int:
    """Up to 1,000 images, and at most half of n."""
    return max(2, min(SUBSET, n // 2))


def _counts(subsets: Sequence[Rows], count: int) -> Tensor:
    """How often each image is in each subset [subsets, count]: once or not."""
    found = torch.zeros(len(subsets), count, dtype=torch.float64)
    for row, chosen in zip(found, subsets, strict=True):
        row[torch.from_numpy(chosen)] = 1
    return found


def _within(x: Tensor, u: Tensor) -> Tensor:
    """Mean kernel over the pairs of different images of each subset [subsets]; u [subsets, n]."""
    n = u.sum(1)
    same = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return (_between(x, x, u, u) - u @ same) / (n * (n - 1))


def _between(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Sum of u_i k(x_i, y_j) v_j over all pairs, of each subset, some rows at a time."""
    total = torch.zeros(len(u), dtype=torch.float64)
    size = max(1, _BLOCK // len(y))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        kernel = (x[rows] @ y.T).div_(x.shape[1]).add_(1).pow_(3)
        total += ((u[:, rows] @ kernel) * v).sum(1)
    return total


class _AsTheyAre(nn.Module):
    """Takes features, not images."""

    def forward(self, features: Tensor) -> Tensor:
        return features
