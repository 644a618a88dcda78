"""Scores of a set of images against held-out ones, in the features of one network: pure functions.

All are taken at one n, half of the held-out images at most, of which each score has 2 n: in each of some halvings of
these, keyed by the seed, n samples are held against either half, and the score is the mean. (The kernel distance is of
all at once: what it is on average does not depend on n.) The floor, what real images score, is that of the two halves
against each other, which the network that gives the features has not seen.

An interval has the chance of both sides in it: it is made of the same score of halves of both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.evaluate.chance import REPLICATES, Draw, generator, halves_of_both, jackknife_interval, never_sure
from pipelines.evaluate.features import Pixels, torch_threads
from pipelines.evaluate.frechet import Features, distance_of, frechet_effort, halvings
from pipelines.evaluate.kernel import SUBSETS, kernel_distances, kernel_spread, subset_size
from pipelines.evaluate.neighbours import NEIGHBOURS, neighbour_values
from pipelines.evaluate.scores import DENSITY, FRECHET, KID, NOISE, Floors, Score

HELD_OUT = "held-out"
FEWEST = 2 * (max(NEIGHBOURS.values()) + 1)
"""Held-out images that all scores can be taken against."""
KERNEL_SPLITS = 10
"""Halvings for the floor of the kernel distance, and at most for the neighbours' scores."""
NEIGHBOUR_PAIRS = 1_500_000_000
"""So many distances the replicates of the neighbours' scores look at, or 20 of them do, and a tenth of it the halvings,
or two of them."""
BATCH = 256
PARTS = (FRECHET, KID, "neighbours")
"""Of the scores of sets, what is worked out by itself."""
_ALONE = 4
"""Images of each side for a distance, of whose halves there is one too."""


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
    blind: Features | None
    """[n, d], of uniform noise: by its score a blind network is known. None where floors are given, who know it."""
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

    def chosen(self, seed: int) -> tuple[Features, Features]:
        """Ours and the real ones that the scores are of: 2 n of either at most, keyed by the seed."""
        return _chosen(self.ours, 2 * self.n, seed, "ours"), _chosen(self.real, 2 * self.n, seed, "real")

    def provenance(self, seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of every score of these sets, with what only the caller knows (dataset_digest, model_digest,
        ema, sampler, steps, sample_seed)."""
        return {
            **known,
            "n": self.n,
            "samples": min(len(self.ours), 2 * self.n),
            "held_out": 2 * self.n,
            "features_digest": self.digest,
            "preprocessing": self.preprocessing,
            "split": HELD_OUT,
            "seed": seed,
        }


def common_size(samples: int, held_out: int) -> int:
    """The n of all scores. UserError where it would be below 4: half of it has a score too, for the interval."""
    n = min(samples, held_out // 2)
    if n < _ALONE:
        raise UserError(
            f"{samples} samples and {held_out} held-out images are too few for a score, "
            f"which takes {_ALONE} and {2 * _ALONE}: raise sample.n or data.held_out"
        )
    return n


def uniform_noise(shape: tuple[int, ...], seed: int) -> Pixels:
    """Images of nothing: uint8, every pixel uniform in 0..255, keyed by the seed."""
    return generator(seed, "noise").integers(256, size=shape, dtype=np.uint8)


def floor_part(part: str, real: Features, n: int, seed: int, blind: Callable[[], Features]) -> dict[str, float]:
    """What no model has a part in, of one of the PARTS: floors at n by score, and the distance of noise by NOISE.

    Of held-out images' features [M, d], with as many halvings as the scores take; for the features [n, d] of noise, by
    which `SetFeatures` knows a blind network, `blind` is asked where they are needed. UserError where n is too small
    for neighbours' scores.
    """
    with torch_threads(1):
        if part == FRECHET:
            splits = frechet_effort(n, real.shape[1])[0]
            floor, noise = _frechet_floor(real, blind(), seed, splits)
            return {FRECHET: floor, NOISE: noise}
        if part == KID:
            return {KID: _kernel_floor(real, n, seed)}
        return _neighbour_floors(real, n, seed)


def set_scores(part: str, sets: SetFeatures, seed: int, provenance: Mapping[str, Any], floors: Floors) -> list[Score]:
    """The scores of one of the PARTS. UserError where there are too few images."""
    if part == FRECHET:
        return [frechet_score(sets, seed=seed, provenance=provenance, floors=floors)]
    if part == KID:
        return [kernel_score(sets, seed=seed, provenance=provenance, floors=floors)]
    return neighbour_scores(sets, seed=seed, provenance=provenance, floors=floors)


def frechet_score(
    sets: SetFeatures,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    floors: Floors | None = None,
    splits: int | None = None,
    replicates: int | None = None,
) -> Score:
    """Frechet distance, with its floor; the score of noise, in floors, is in its provenance.

    Floors that are not given are worked out; as many halvings and replicates as are worth their time, where none are.
    """
    _check(floors, sets.n)
    usual = frechet_effort(sets.n, sets.real.shape[1])
    splits, replicates = splits or usual[0], replicates or usual[1]
    with torch_threads(1):
        ours, real = sets.chosen(seed)
        draws = _Draws.of(len(ours), len(real), seed, splits, replicates)
        value, again = draws.estimates(_distances(ours, real, draws.all))
        if floors is None:
            assert sets.blind is not None, "floors or noise are needed"
            floor, noise = _frechet_floor(sets.real, sets.blind, seed, splits)
        else:
            floor, noise = floors.floors[FRECHET], floors.noise
    added = {
        "splits": splits,
        "replicates": replicates,
        "floor": floor,
        # No floor where all held-out images are the same one; JSON has no infinity.
        "noise_in_floors": noise / floor if floor > 0 else None,
    }
    low, high = jackknife_interval(value, again)
    return Score(FRECHET, value, (max(0.0, low), high), {**sets.provenance(seed, provenance), **added})


def kernel_score(
    sets: SetFeatures,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    floors: Floors | None = None,
    replicates: int = REPLICATES,
) -> Score:
    """Kernel distance, with the spread over subsets; its floor is 0 but for chance."""
    _check(floors, sets.n)
    size = subset_size(sets.n)
    with torch_threads(1):
        ours, real = sets.chosen(seed)
        halves = halves_of_both(len(ours), len(real), seed, replicates)
        value, *again = kernel_distances(ours, real, [(np.arange(len(ours)), np.arange(len(real))), *halves])
        spread = kernel_spread(ours, real, seed, size)
        floor = _kernel_floor(sets.real, sets.n, seed) if floors is None else floors.floors[KID]
    added = {
        "floor_splits": KERNEL_SPLITS,
        "replicates": replicates,
        "floor": floor,
        "spread": spread,
        "subsets": SUBSETS,
        "subset": size,
    }
    interval = jackknife_interval(float(value), np.array(again))
    return Score(KID, float(value), interval, {**sets.provenance(seed, provenance), **added})


def neighbour_scores(
    sets: SetFeatures,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    floors: Floors | None = None,
    replicates: int | None = None,
) -> list[Score]:
    """Precision, recall, density and coverage, each with what real images score. UserError for too few of them."""
    _check(floors, sets.n)
    _check_neighbours(sets.n)
    splits = _neighbour_splits(sets.n)
    replicates = replicates or min(REPLICATES, max(20, NEIGHBOUR_PAIRS // sets.n**2))
    with torch_threads(1):
        ours, real = sets.chosen(seed)
        draws = _Draws.of(len(ours), len(real), seed, splits, replicates)
        values = neighbour_values(ours, real, draws.all)
        real_ones = _neighbour_floors(sets.real, sets.n, seed) if floors is None else floors.floors
    scores = []
    for name, k in NEIGHBOURS.items():
        value, again = draws.estimates(values[name])
        low, high = jackknife_interval(value, again)
        # The least that is known of a share; density is none, and may exceed 1.
        share = never_sure((low, high), sets.n)
        interval = (max(0.0, low), max(share[1], high)) if name == DENSITY else share
        added = {"splits": splits, "replicates": replicates, "neighbours": k, "floor": real_ones[name]}
        scores.append(Score(name, value, interval, {**sets.provenance(seed, provenance), **added}))
    return scores


@dataclass(frozen=True)
class _Draws:
    """Who is held against whom for a score and its interval, two pairs of sets at a time."""

    halvings: list[Draw]
    replicates: list[Draw]

    @staticmethod
    def of(ours: int, real: int, seed: int, splits: int, replicates: int) -> "_Draws":
        """Of some of our images and 2 n real ones: n of ours, together as many different ones as there are, against
        either half of these; and the same among a half of ours and one of the real ones."""
        n, halved, again = real // 2, [], []
        for split, pair in enumerate(halvings(real, n, seed, splits)):
            order = generator(seed, "subset", split).permutation(ours)
            halved += [(order[:n], pair[0]), (order[-n:], pair[1])]
        for mine, half in halves_of_both(ours, real, seed, replicates):
            again += [(mine[: n // 2], half[: n // 2]), (mine[-(n // 2) :], half[n // 2 : n // 2 * 2])]
        return _Draws(halved, again)

    @property
    def all(self) -> list[Draw]:
        return self.halvings + self.replicates

    def estimates(self, values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The score, and that of each replicate, from the values of all draws."""
        value, again = values[: len(self.halvings)], values[len(self.halvings) :]
        return float(value.mean()), again.reshape(-1, 2).mean(1)


def _chosen(features: Features, most: int, seed: int, purpose: str) -> Features:
    if len(features) <= most:
        return features
    return features[np.sort(generator(seed, f"chosen-{purpose}").permutation(len(features))[:most])]


def _distances(a: Features, b: Features, draws: Sequence[Draw]) -> NDArray[np.float64]:
    return np.array([distance_of(a[rows], b[others]) for rows, others in draws])


def _frechet_floor(real: Features, blind: Features, seed: int, splits: int) -> tuple[float, float]:
    """Mean distances of halves from each other, and of noise from either."""
    real, pairs = _halves(real, len(blind), seed, splits)
    noise = np.arange(len(blind))
    worst = _distances(blind, real, [(noise, half) for pair in pairs for half in pair])
    return float(_distances(real, real, pairs).mean()), float(worst.mean())


def _kernel_floor(real: Features, n: int, seed: int) -> float:
    real, pairs = _halves(real, n, seed, KERNEL_SPLITS)
    return float(kernel_distances(real, real, pairs).mean())


def _neighbour_floors(real: Features, n: int, seed: int) -> dict[str, float]:
    _check_neighbours(n)
    real, pairs = _halves(real, n, seed, _neighbour_splits(n))
    return {name: float(values.mean()) for name, values in neighbour_values(real, real, pairs).items()}


def _halves(real: Features, n: int, seed: int, splits: int) -> tuple[Features, list[Draw]]:
    """The real images that scores are taken against, and the pairs of their halves."""
    return _chosen(real, 2 * n, seed, "real"), list(halvings(2 * n, n, seed, splits))


def _neighbour_splits(n: int) -> int:
    return min(KERNEL_SPLITS, max(2, NEIGHBOUR_PAIRS // 10 // n**2))


def _check(floors: Floors | None, n: int) -> None:
    if floors is not None and floors.n != n:
        raise ValueError(f"floors at n = {floors.n} are none of scores at n = {n}")


def _check_neighbours(n: int) -> None:
    if n < FEWEST // 2:
        raise UserError(
            f"{n} images are too few for precision and recall, which take {FEWEST // 2}: raise data.held_out"
        )
