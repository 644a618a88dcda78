"""Scores of a set of images against held-out ones, in the features of one network: pure functions.

All are taken at one n, half of the held-out images at most: in each of some halvings of these, keyed by the seed, n
random samples are held against either half, and the score is the mean. Its floor, what real images score, is that of
the two halves against each other, which the network that gives the features has not seen.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.evaluate.chance import generator
from pipelines.evaluate.features import Pixels, torch_threads
from pipelines.evaluate.frechet import Features, Statistics, bootstrap_spread, frechet_distance, halvings
from pipelines.evaluate.kernel import kernel_distance, kernel_interval, kernel_spread
from pipelines.evaluate.neighbours import NEIGHBOURS, mean_interval, neighbour_terms
from pipelines.evaluate.scores import DENSITY, FRECHET, KID, Score

HELD_OUT = "held-out"
FEWEST = 2 * (max(NEIGHBOURS.values()) + 1)
"""Held-out images that all scores can be taken against."""
SPLITS = 50
KERNEL_SPLITS = 10
_NEIGHBOUR_PAIRS = 4_000_000
"""So many distances, at least one halving's, the neighbours' scores are made of."""
REPLICATES = 200
BATCH = 256


class Extractor(Protocol):
    """What gives features of images."""

    @property
    def digest(self) -> str: ...

    @property
    def preprocessing(self) -> str: ...

    def features(self, images: Pixels, batch: int = BATCH) -> Features:
        """uint8 [N, H, W, C] -> float64 [N, d]."""


@dataclass(frozen=True, eq=False)
class SetFeatures:
    """What the scores of a set are taken from, all by one network."""

    ours: Features
    """[S, d], of the images that are scored."""
    real: Features
    """[M, d], of held-out ones."""
    blind: Features
    """[n, d], of uniform noise: by its score a blind network is known."""
    digest: str
    """Of the network."""
    preprocessing: str

    @staticmethod
    def of(net: Extractor, samples: Pixels, held_out: Pixels, seed: int, batch: int = BATCH) -> "SetFeatures":
        """Of images uint8 [S, H, W, C] and [M, H, W, C]. UserError where they are too few."""
        n = common_size(len(samples), len(held_out))
        noise = uniform_noise((n, *held_out.shape[1:]), seed)
        # On one thread: the score's bits do not depend on how many the caller has.
        with torch_threads(1):
            ours, real, blind = (net.features(images, batch) for images in (samples, held_out, noise))
        return SetFeatures(ours, real, blind, net.digest, net.preprocessing)

    @property
    def n(self) -> int:
        """Images of each side in every score."""
        return common_size(len(self.ours), len(self.real))

    def provenance(self, seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of every score of these sets, with what only the caller knows (dataset_digest, model_digest,
        ema, sampler, steps, sample_seed)."""
        return {
            **known,
            "n": self.n,
            "samples": len(self.ours),
            "features_digest": self.digest,
            "preprocessing": self.preprocessing,
            "split": HELD_OUT,
            "seed": seed,
        }

    def pairs(self, seed: int, splits: int) -> Iterator[tuple[Features, Features, Features]]:
        """n samples and the two halves of the held-out images, of each halving."""
        for split, (first, second) in enumerate(halvings(len(self.real), self.n, seed, splits)):
            taken = generator(seed, "subset", split).permutation(len(self.ours))[: self.n]
            yield self.ours[taken], self.real[first], self.real[second]


def common_size(samples: int, held_out: int) -> int:
    """The n of all scores. UserError where it would be below 2."""
    n = min(samples, held_out // 2)
    if n < 2:
        raise UserError(
            f"{samples} samples and {held_out} held-out images are too few for a score, "
            "which takes 2 and 4: raise sample.n or data.held_out"
        )
    return n


def uniform_noise(shape: tuple[int, ...], seed: int) -> Pixels:
    """Images of nothing: uint8, every pixel uniform in 0..255, keyed by the seed."""
    return generator(seed, "noise").integers(256, size=shape, dtype=np.uint8)


def frechet_score(
    sets: SetFeatures,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    splits: int = SPLITS,
    replicates: int = REPLICATES,
) -> Score:
    """Frechet distance, with its floor; the score of noise, in floors, is in its provenance."""

    def distance(a: Features, b: Features) -> float:
        return frechet_distance(Statistics.of(a), Statistics.of(b))

    with torch_threads(1):
        values, floors = _against_halves(distance, sets, seed, splits)
        blind = SetFeatures(sets.blind, sets.real, sets.blind, sets.digest, sets.preprocessing)
        worst = float(np.mean(_against_halves(distance, blind, seed, splits, floor=False)[0]))
        low, high = bootstrap_spread(sets.ours, sets.real, seed, replicates)
    value, floor = float(np.mean(values)), float(np.mean(floors))
    added = {
        "splits": splits,
        "floor": floor,
        # No floor where all held-out images are the same one; JSON has no infinity.
        "noise_in_floors": worst / floor if floor > 0 else None,
    }
    interval = (max(0.0, value + low), value + high)
    return Score(FRECHET, value, interval, {**sets.provenance(seed, provenance), **added})


def kernel_score(
    sets: SetFeatures,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    splits: int = KERNEL_SPLITS,
    replicates: int = REPLICATES,
) -> Score:
    """Kernel distance, with the spread over subsets; its floor is 0 but for chance."""
    with torch_threads(1):
        values, floors = _against_halves(lambda a, b: kernel_distance(a, b, seed), sets, seed, splits)
        ours, first, _ = next(sets.pairs(seed, 1))
        low, high = kernel_interval(ours, first, seed, replicates)
        around = kernel_distance(ours, first, seed)
        spread = kernel_spread(ours, first, seed)
    value = float(np.mean(values))
    added = {"splits": splits, "floor": float(np.mean(floors)), "spread": spread}
    interval = (value + low - around, value + high - around)
    return Score(KID, value, interval, {**sets.provenance(seed, provenance), **added})


def neighbour_scores(
    sets: SetFeatures, *, seed: int, provenance: Mapping[str, Any], replicates: int = REPLICATES
) -> list[Score]:
    """Precision, recall, density and coverage, each with what real images score. UserError for too few of them."""
    if sets.n <= max(NEIGHBOURS.values()):
        raise UserError(f"{sets.n} images are too few for precision and recall, which take 6: raise data.held_out")
    splits = max(1, min(KERNEL_SPLITS, _NEIGHBOUR_PAIRS // sets.n**2))
    values: dict[str, list[float]] = {name: [] for name in NEIGHBOURS}
    floors: dict[str, list[float]] = {name: [] for name in NEIGHBOURS}
    terms: dict[str, NDArray[np.float64]] = {}
    with torch_threads(1):
        for ours, *halves in sets.pairs(seed, splits):
            for half in halves:
                found = neighbour_terms(ours, half)
                terms = terms or found
                for name in NEIGHBOURS:
                    values[name].append(float(found[name].mean()))
            for name, real in neighbour_terms(*halves).items():
                floors[name].append(float(real.mean()))
    scores = []
    for name, k in NEIGHBOURS.items():
        value = float(np.mean(values[name]))
        around = float(terms[name].mean())
        most = np.inf if name == DENSITY else 1.0
        below, above = (end - around for end in mean_interval(terms[name], seed, name, replicates))
        low, high = max(0.0, value + min(0.0, below)), min(most, value + max(0.0, above))
        added = {"splits": splits, "neighbours": k, "floor": float(np.mean(floors[name]))}
        scores.append(Score(name, value, (float(low), float(high)), {**sets.provenance(seed, provenance), **added}))
    return scores


def _against_halves(
    distance: Callable[[Features, Features], float], sets: SetFeatures, seed: int, splits: int, floor: bool = True
) -> tuple[list[float], list[float]]:
    """Distances of ours from either half, and those of the halves from each other, over the halvings."""
    values, floors = [], []
    for ours, first, second in sets.pairs(seed, splits):
        values += [distance(ours, half) for half in (first, second)]
        if floor:
            floors.append(distance(first, second))
    return values, floors
