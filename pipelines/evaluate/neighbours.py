"""How two sets of images lie to each other, by the balls around each image that reach to its k-th neighbour.

Improved precision and recall: Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing generative
models", equations 1 and 2, k = 3. Density and coverage: Naeem et al. 2020, "Reliable fidelity and diversity metrics for
generative models", equations 4 and 5, k = 5. Each is a mean over images, of whose terms the interval is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.evaluate.chance import generator
from pipelines.evaluate.frechet import Features
from pipelines.evaluate.scores import COVERAGE, DENSITY, PRECISION, RECALL

NEIGHBOURS = {PRECISION: 3, RECALL: 3, DENSITY: 5, COVERAGE: 5}
"""k by score."""
_BLOCK = 512


@dataclass(frozen=True)
class _Balls:
    """Around each of a set's images, radii that reach to its k-th neighbour among the others."""

    radii: Mapping[int, Tensor]

    @staticmethod
    def of(x: Tensor, *numbers: int) -> "_Balls":
        found = {k: torch.empty(len(x), dtype=torch.float64) for k in numbers}
        for start in range(0, len(x), _BLOCK):
            rows = slice(start, start + _BLOCK)
            # The image itself is the nearest one.
            nearest = _distances(x[rows], x).topk(max(numbers) + 1, largest=False, sorted=True).values
            for k in numbers:
                found[k][rows] = nearest[:, k]
        return _Balls(found)


def neighbour_terms(ours: Features, real: Features) -> dict[str, NDArray[np.float64]]:
    """By score, the term of each image, of which it is the mean: of each of ours for precision (is it in a real image's
    ball?) and density (in how many, over k?), of each real one for recall (is it in a ball of ours?) and coverage (is
    one of ours in its ball?). Features [n, d] and [m, d]; ValueError for fewer than 6 images of either.
    """
    fewest = max(NEIGHBOURS.values()) + 1
    if min(len(ours), len(real)) < fewest:
        raise ValueError(f"{fewest} images or more of each are needed, not {len(ours)} and {len(real)}")
    x, y = (torch.from_numpy(np.ascontiguousarray(s, dtype=np.float64)) for s in (ours, real))
    around_ours = _Balls.of(x, NEIGHBOURS[RECALL]).radii
    around_real = _Balls.of(y, NEIGHBOURS[PRECISION], NEIGHBOURS[COVERAGE]).radii
    inside = torch.zeros(len(x), dtype=torch.bool)
    balls = torch.zeros(len(x), dtype=torch.float64)
    reached = torch.zeros(len(y), dtype=torch.bool)
    nearest = torch.full((len(y),), torch.inf, dtype=torch.float64)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distances = _distances(x[rows], y)
        inside[rows] = (distances <= around_real[NEIGHBOURS[PRECISION]]).any(1)
        balls[rows] = (distances <= around_real[NEIGHBOURS[DENSITY]]).sum(1).double()
        reached |= (distances <= around_ours[NEIGHBOURS[RECALL]][rows, None]).any(0)
        nearest = torch.minimum(nearest, distances.min(0).values)
    terms = {
        PRECISION: inside,
        RECALL: reached,
        DENSITY: balls / NEIGHBOURS[DENSITY],
        COVERAGE: nearest <= around_real[NEIGHBOURS[COVERAGE]],
    }
    return {name: term.double().numpy() for name, term in terms.items()}


def mean_interval(terms: NDArray[np.float64], seed: int, purpose: str, replicates: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of terms [n], keyed by seed and purpose."""
    random = generator(seed, f"{purpose}-bootstrap")
    means = [terms[random.integers(len(terms), size=len(terms))].mean() for _ in range(replicates)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Not by inner products: images that are alike would be at a distance of rounding errors.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
