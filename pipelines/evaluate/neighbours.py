"""How two sets of images lie to each other, by the balls around each image that reach to its k-th neighbour.

Improved precision and recall: Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing generative
models", equations 1 and 2, k = 3. Density and coverage: Naeem et al. 2020, "Reliable fidelity and diversity metrics for
generative models", equations 4 and 5, k = 5. Many subsets of the same images are scored at once: each distance is
worked out once, some rows at a time, and looked at by all of them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.evaluate.chance import Draw, Rows
from pipelines.evaluate.frechet import Features
from pipelines.evaluate.scores import COVERAGE, DENSITY, PRECISION, RECALL

NEIGHBOURS = {PRECISION: 3, RECALL: 3, DENSITY: 5, COVERAGE: 5}
"""k by score."""
_BLOCK = 2**19
"""Distances at a time."""
_LIST = 64
"""Neighbours of an image that are kept in order: among so many a quarter of its set has k, or else all are asked."""
_CLOSE = 4e-6
"""Squared distances below this share of an image's square are worked out again, without inner products, by which images
that are alike would be at a distance of rounding errors."""
_RIM = 1 + 1e-9
"""A copy of the k-th neighbour lies on the rim of a ball, whichever way it was rounded."""


def neighbour_values(ours: Features, real: Features, draws: Sequence[Draw]) -> dict[str, NDArray[np.float64]]:
    """Scores by name [draws], each of some of our images [S, d] held against some of the real ones [M, d].

    Precision is the share of ours in a real one's ball, density in how many balls they are on average, over k, recall
    the share of real ones in a ball of ours, coverage that of real ones with one of ours in their ball. A set of k
    images or fewer has balls that reach to its farthest. ValueError for fewer than two images in a set.
    """
    if min(len(rows) for draw in draws for rows in draw) < 2:
        raise ValueError("two images or more of each are needed")
    centre = real.mean(0)
    x, y = (torch.from_numpy(np.ascontiguousarray(s - centre, dtype=np.float64)) for s in (ours, real))
    ours_rows, real_rows = ([draw[side] for draw in draws] for side in (0, 1))
    (around_ours,) = _radii(x, ours_rows, NEIGHBOURS[RECALL])
    narrow, wide = _radii(y, real_rows, NEIGHBOURS[PRECISION], NEIGHBOURS[COVERAGE])
    inside, balls = np.zeros(len(draws)), np.zeros(len(draws))
    reached, covered = (np.zeros((len(draws), len(y)), dtype=bool) for _ in range(2))
    mine = _members(ours_rows, len(x))
    for rows, distances in _blocks(x, y):
        for draw, columns in enumerate(real_rows):
            chosen = np.flatnonzero(mine[draw, rows])
            d = distances[np.ix_(chosen, columns)]
            within = d <= wide[draw, columns]
            inside[draw] += (d <= narrow[draw, columns]).any(1).sum()
            balls[draw] += np.count_nonzero(within)
            reached[draw, columns] |= (d <= around_ours[draw, rows][chosen, None]).any(0)
            covered[draw, columns] |= within.any(0)
    n, m = (np.array([len(rows) for rows in side]) for side in (ours_rows, real_rows))
    return {
        PRECISION: inside / n,
        RECALL: reached.sum(1) / m,
        DENSITY: balls / n / NEIGHBOURS[DENSITY],
        COVERAGE: covered.sum(1) / m,
    }


def _radii(x: Tensor, subsets: Sequence[Rows], *numbers: int) -> list[NDArray[np.float64]]:
    """For each k, of each subset the squared radii [subsets, N] of its images; without meaning for the others."""
    members = _members(subsets, len(x))
    found = [np.zeros(members.shape) for _ in numbers]
    for rows, distances in _blocks(x, x):
        nearest, order = torch.from_numpy(distances).topk(min(_LIST, len(x)), largest=False, sorted=True)
        near, where = nearest.numpy(), order.numpy()
        for subset, among in enumerate(members):
            # The image itself is the nearest one.
            count = among[where].cumsum(1)
            for k, radii in zip(numbers, found, strict=True):
                wanted = min(k + 1, len(subsets[subset]))
                radius = near[np.arange(len(near)), (count >= wanted).argmax(1)]
                for short in np.flatnonzero(count[:, -1] < wanted):
                    radius[short] = np.partition(distances[short, among], wanted - 1)[wanted - 1]
                radii[subset, rows] = radius * _RIM
    return found


def _members(subsets: Sequence[Rows], count: int) -> NDArray[np.bool_]:
    members = np.zeros((len(subsets), count), dtype=bool)
    for member, rows in zip(members, subsets, strict=True):
        member[rows] = True
    return members


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Rows of x, and their squared distances [rows, len(y)] from all of y."""
    size = max(1, _BLOCK // len(y))
    x_squares, y_squares = (s.square().sum(1) for s in (x, y))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        found = torch.addmm(y_squares, x[rows], y.T, alpha=-2).add_(x_squares[rows, None])
        near = (found <= _CLOSE * x_squares[rows, None]).nonzero()
        for pairs in near.split(max(1, _BLOCK // x.shape[1])):
            i, j = pairs.unbind(1)
            found[i, j] = (x[rows][i] - y[j]).square().sum(1)
        yield rows, found.numpy()
