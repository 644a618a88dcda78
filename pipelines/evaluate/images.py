"""All scores that a set of images has by itself, whoever drew it, against a dataset."""

from collections.abc import Mapping
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
from pipelines.evaluate.look import Look, Looker, look_at
from pipelines.evaluate.memory import NEAR, SPLITS, memory, nearest
from pipelines.evaluate.scores import AGREEMENT, NEAR_FEATURES, NEAR_PIXELS, Score
from pipelines.evaluate.sets import (
    HELD_OUT,
    Extractor,
    SetFeatures,
    common_size,
    floors_of,
    frechet_score,
    kernel_score,
    neighbour_scores,
    uniform_noise,
)
from pipelines.evaluate.units import features_of, units_of
from pipelines.store import Place


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

    def look(self, images: Dataset, n: int) -> Look:
        """At the first n training images of a dataset, drawn ones say."""
        return look_at(units_of(images, "train", n), self.looker, self.cluster)

    def sets(self, ours: NDArray[np.float64], seed: int) -> SetFeatures:
        """What the scores of images with these features are taken from. UserError where they are too few."""
        size, net = common_size(len(ours), len(self.held_out.index)), self.net
        side, channels = self.dataset.image_size, self.dataset.channels
        with torch_threads(1):
            blind = net.features(uniform_noise((size, side, side, channels), seed))
        return SetFeatures(ours, self.held_out.features, blind, net.digest, net.preprocessing)

    def accuracy(self) -> float | None:
        """Of a small network, on the held-out images."""
        if not isinstance(self.net, FeatureNet):
            return None
        if self.net.config.task == "classes":
            return float((self.held_out.guesses == self.held_out.labels).mean())
        images, labels = Reader(self.dataset.split(HELD_OUT)).read_all()
        with torch_threads(1):
            return self.net.accuracy(images, labels)


def score_images(
    look: Look, reference: Reference, *, seed: int, provenance: Mapping[str, Any], asked: bool
) -> ImageScores:
    """Score images that were looked at. `asked`: their labels are classes that they were drawn for.

    `provenance` holds what only the caller knows of the images. UserError where they are too few.
    """
    sets = reference.sets(look.features, seed)
    known = {**provenance, "dataset_digest": reference.dataset.digest}
    # Of all images, unlike the scores of sets.
    counts = {"n": len(look.index), "samples": len(look.index), "held_out": len(reference.held_out.index)}
    facts = {**sets.provenance(seed, known), **counts}
    floors = floors_of(sets.real, sets.blind, seed)
    train = features_of(
        units_of(reference.dataset, "train"), reference.net, reference.store / "features", reference.cluster
    )
    with torch_threads(1):
        near_features = nearest(look.features, train).distance
        apart_features = nearest(reference.held_out.features, train).distance
    scores = [
        frechet_score(sets, seed=seed, provenance=known, floors=floors),
        kernel_score(sets, seed=seed, provenance=known, floors=floors),
        *neighbour_scores(sets, seed=seed, provenance=known, floors=floors),
        _memory_score(NEAR_FEATURES, near_features, apart_features, len(train), facts),
        _memory_score(NEAR_PIXELS, look.distance, reference.held_out.distance, len(train), facts),
    ]
    if asked and (look.guesses >= 0).all():
        right = look.guesses == look.labels
        interval = share_interval(int(right.sum()), len(right))
        scores.append(Score(AGREEMENT, float(right.mean()), interval, {**facts, "floor": reference.accuracy()}))
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
