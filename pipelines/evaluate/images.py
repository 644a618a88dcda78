"""All scores that a set of images has by itself, whoever drew it, against a dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import report
from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.evaluate.chance import REPLICATES, share_interval
from pipelines.evaluate.features import FeatureNet, torch_threads
from pipelines.evaluate.frechet import Features
from pipelines.evaluate.kept import kept_json
from pipelines.evaluate.look import Look, Looker, look_at
from pipelines.evaluate.memory import NEAR, SPLITS, memory
from pipelines.evaluate.scores import AGREEMENT, FRECHET, NEAR_FEATURES, NEAR_PIXELS, Floors, Score
from pipelines.evaluate.sets import HELD_OUT, Extractor, SetFeatures
from pipelines.evaluate.statistics import floors_at, scores_of
from pipelines.evaluate.units import Unit, features_place, nearest_in_features, units_of
from pipelines.store import Place

ACCURACY, TURNS_ACCURACY = "feature_accuracy", "feature_turns_accuracy"


@dataclass(frozen=True)
class ImageScores:
    """Scores, and a picture of the images that are nearest to training images above these."""

    scores: list[Score]
    pairs: bytes


@dataclass(frozen=True, eq=False)
class Reference:
    """A dataset that images are scored against, in the features of one network."""

    dataset: Dataset
    net: Extractor
    held_out: Look
    looker: Looker
    store: Place
    cluster: Cluster

    @staticmethod
    def of(dataset: Dataset, net: Extractor, store: Place, cluster: Cluster) -> "Reference":
        """With the held-out images looked at, or found in the store to have been."""
        looker = Looker(net, dataset, store)
        return Reference(dataset, net, look_at(units_of(dataset, HELD_OUT), looker, cluster), looker, store, cluster)

    def look(self, units: Sequence[Unit]) -> Look:
        """At images, drawn ones say."""
        return look_at(units, self.looker, self.cluster)

    def sets(self, ours: Features) -> SetFeatures:
        """What the scores of images with these features are taken from."""
        return SetFeatures(ours, self.held_out.features, None, self.net.digest, self.net.preprocessing)

    def floors(self, n: int, seed: int) -> Floors:
        """What real images score against real ones at n. UserError where it is too small."""
        shape = (self.dataset.image_size, self.dataset.image_size, self.dataset.channels)
        return floors_at(n, self.held_out.features, self.net, shape, seed, self.store, self.cluster)

    def frechet(self, ours: Features, seed: int, provenance: Mapping[str, Any]) -> Score:
        """The Frechet distance alone of images with these features. UserError where they are too few."""
        sets = self.sets(ours)
        floors = self.floors(sets.n, seed)
        return scores_of(sets, seed, provenance, floors, self.store, self.cluster, parts=(FRECHET,))[0]

    @property
    def classes_told(self) -> int | None:
        """How many classes the network tells; None of one that tells none."""
        config = self.net.config if isinstance(self.net, FeatureNet) else None
        return config.classes if config is not None and config.task == "classes" else None

    def accuracy(self) -> dict[str, float]:
        """Of a small network on the held-out images, by what it was trained to tell: `feature_accuracy` of classes,
        where images have one, or `feature_turns_accuracy`, which says less."""
        if not isinstance(self.net, FeatureNet):
            return {}
        if self.net.config.task == "turns":
            place = features_place(self.store, self.net) / f"turns-{self.dataset.digest[:16]}.json"
            return {TURNS_ACCURACY: float(kept_json(place, self._turns_accuracy))}
        labelled = self.held_out.labels >= 0
        right = self.held_out.guesses[labelled] == self.held_out.labels[labelled]
        return {ACCURACY: float(right.mean())} if len(right) else {}

    def _turns_accuracy(self) -> float:
        """A shard at a time: the images may be many."""
        assert isinstance(self.net, FeatureNet)
        right, units = 0.0, units_of(self.dataset, HELD_OUT)
        with torch_threads(1):
            for unit in units:
                right += self.net.accuracy(*unit.read()) * unit.count
        return right / sum(unit.count for unit in units)


def score_images(
    look: Look, reference: Reference, *, seed: int, provenance: Mapping[str, Any], asked: bool
) -> ImageScores:
    """Score images that were looked at. `asked`: their labels are the dataset's classes, for which they were drawn.

    `provenance` holds what only the caller knows of the images. UserError where they are too few.
    """
    sets = reference.sets(look.features)
    known = {**provenance, "dataset_digest": reference.dataset.digest}
    floors = reference.floors(sets.n, seed)
    scores = scores_of(sets, seed, known, floors, reference.store, reference.cluster)
    # Of all images, unlike the scores of sets.
    counts = {"n": len(look.index), "samples": len(look.index), "held_out": len(reference.held_out.index)}
    facts = {**sets.provenance(seed, known), **counts}
    train = units_of(reference.dataset, "train")
    near, apart = (
        nearest_in_features(features, train, reference.net, reference.store, reference.cluster)
        for features in (look.features, reference.held_out.features)
    )
    trained_on = sum(unit.count for unit in train)
    scores += [
        _memory_score(NEAR_FEATURES, near, apart, trained_on, facts),
        _memory_score(NEAR_PIXELS, look.distance, reference.held_out.distance, trained_on, facts),
    ]
    if asked and (look.guesses >= 0).all():
        right = look.guesses == look.labels
        interval = share_interval(int(right.sum()), len(right))
        floor = reference.accuracy().get(ACCURACY)
        scores.append(Score(AGREEMENT, float(right.mean()), interval, {**facts, "floor": floor}))
    return ImageScores(scores, _pairs(look, reference))


def _memory_score(
    name: str,
    near: NDArray[np.float64],
    held_out: NDArray[np.float64],
    trained_on: int,
    facts: Mapping[str, Any],
) -> Score:
    """The share of images that lie near a training image; its floor is the held-out images' own."""
    found = memory(near, held_out, facts["seed"])
    added = {
        "share": NEAR,
        "splits": SPLITS,
        "replicates": REPLICATES,
        "threshold": found.threshold,
        "floor": found.own_rate,
        "copies": int((near == 0).sum()),
        "trained_on": trained_on,
    }
    return Score(name, found.rate, found.interval, {**facts, **added})


def _pairs(look: Look, reference: Reference) -> bytes:
    """Rows of images and, below each, the training image that is nearest to it; the nearest pair first."""
    columns = min(8, len(look.closest))
    count = len(look.closest) // columns * columns
    chosen = look.index[look.closest[:count]]
    split = reference.dataset.split("train")
    ends = np.cumsum([0, *split.shard_sizes])
    shards = np.searchsorted(ends, chosen, side="right") - 1
    originals, _ = Reader(split).read(shards, chosen - ends[shards])
    rows = [slice(start, start + columns) for start in range(0, count, columns)]
    shown = [np.concatenate([look.pixels[row], originals[row]]) for row in rows]
    return report.grid(np.concatenate(shown), columns=columns)
