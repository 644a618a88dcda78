"""The kernel distance between two sets of images (KID), an unbiased estimate at any number of them.

Binkowski et al. 2018, "Demystifying MMD GANs", section 3.2 and equation 4: the squared maximum mean discrepancy of the
features under the kernel k(x, y) = (x . y / d + 1)^3. Two sets of real images are at 0 on average, and single values
may lie below it.
"""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_core import noise
from pipelines.evaluate.chance import generator
from pipelines.evaluate.frechet import Features

SUBSETS = 100
SUBSET = 1000
"""Most images of a subset, as is usual for the spread."""
_BLOCK = 1024


def kernel_distance(a: Features, b: Features, seed: int) -> float:
    """The estimate from all images of two sets of features [n, d] of one size. ValueError for fewer than two images."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"two sets of as many images, two or more, are needed, not {len(a)} and {len(b)}")
    return _over_subsets(a, b, seed, subsets=1, size=len(a))[0]


def kernel_spread(a: Features, b: Features, seed: int) -> float:
    """Standard deviation of the estimates from 100 random subsets, of up to 1,000 images and at most half of them."""
    return _over_subsets(a, b, seed, SUBSETS, max(2, min(SUBSET, len(a) // 2)))[1]


def kernel_interval(a: Features, b: Features, seed: int, replicates: int) -> tuple[float, float]:
    """95 % bootstrap interval of the estimate: both sets are drawn again with replacement, keyed by the seed.

    Pairs of an image and its own copy, of which another sample would have none, are left out: with them, each
    replicate would lie above the estimate. For sets of one distribution the interval is wider than it had to be.
    """
    draws = [np.empty((replicates, len(x))) for x in (a, b)]
    for replicate in range(replicates):
        random = generator(seed, "kernel-bootstrap", replicate)
        for counts in draws:
            n = counts.shape[1]
            counts[replicate] = np.bincount(random.integers(n, size=n), minlength=n)
    x, y = (torch.from_numpy(np.ascontiguousarray(s, dtype=np.float64)) for s in (a, b))
    u, v = (torch.from_numpy(counts) for counts in draws)
    values = _within(x, u) + _within(y, v) - 2 * _between(x, y, u, v) / (len(a) * len(b))
    low, high = np.quantile(values.numpy(), [0.025, 0.975])
    return float(low), float(high)


def _within(x: Tensor, counts: Tensor) -> Tensor:
    """Mean kernel over the pairs of different images of each draw [replicates]; counts [replicates, n]."""
    same = _kernel_diagonal(x)
    pairs = counts.sum(1) ** 2 - counts.square().sum(1)
    return (_between(x, x, counts, counts) - counts.square() @ same) / pairs


def _between(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Sum of u_i k(x_i, y_j) v_j over all pairs, for each replicate, some rows at a time."""
    total = torch.zeros(len(u), dtype=torch.float64)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        total += ((u[:, rows] @ _kernel(x[rows], y)) * v).sum(1)
    return total


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def _over_subsets(a: Features, b: Features, seed: int, subsets: int, size: int) -> tuple[float, float]:
    """Mean and standard deviation of torchmetrics' estimates from random subsets."""
    from torchmetrics.image.kid import KernelInceptionDistance  # half a second, and only those who score pay it

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps the features, which are here anyway
        torch.manual_seed(noise.key(seed, "kernel-subsets"))  # it takes the global generator
        metric = KernelInceptionDistance(_AsTheyAre(), subsets=subsets, subset_size=size)
        for features, real in ((a, True), (b, False)):
            metric.update(torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64)), real=real)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


class _AsTheyAre(nn.Module):
    """Takes features, not images."""

    def forward(self, features: Tensor) -> Tensor:
        return features
