"""Images by the shard, wherever they lie, and their features: worked out by whichever process, and kept by digest.

A unit's key is the digest of its index, which has the content of every image: the features of one network for one key
are always the same, and are read from the store where they were made before.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.evaluate.features import Pixels, torch_threads
from pipelines.evaluate.frechet import Features
from pipelines.evaluate.kept import kept_arrays, over_kept
from pipelines.evaluate.memory import nearest
from pipelines.evaluate.sets import Extractor
from pipelines.sample.job import Job, Part
from pipelines.store import DamageError, Place, identity, sha256

Labels = NDArray[np.int64]
_FORMAT = 2
"""Of kept features."""


class Unit(Protocol):
    """Some images."""

    @property
    def key(self) -> str:
        """Hex digest of their contents, in order."""

    @property
    def count(self) -> int: ...

    def read(self) -> tuple[Pixels, Labels]:
        """Pixels uint8 [n, H, W, C] and labels [n], -1 for none."""


@dataclass(frozen=True)
class ShardUnit:
    """One shard of a dataset's split, or its first so many images."""

    dataset: Place
    split: str
    number: int
    index_sha256: str
    count: int

    @property
    def key(self) -> str:
        return f"{self.index_sha256[:32]}-{self.count}"

    def read(self) -> tuple[Pixels, Labels]:
        split = Dataset.open(self.dataset).split(self.split)
        if split.shard(self.number).index_sha256.hex() != self.index_sha256:
            raise DamageError(f"{self.dataset} changed while it was scored; start again")
        rows = np.arange(self.count)
        return Reader(split, cache_bytes=0).read(np.full(len(rows), self.number), rows)


def units_of(dataset: Dataset, split: str, most: int | None = None) -> list[ShardUnit]:
    """The images of a split, or the first so many of them, by the shard."""
    units, left = [], len(dataset.split(split)) if most is None else most
    for number, shard in enumerate(dataset.split(split).shards):
        if left > 0:
            count = min(left, shard.samples)
            units.append(ShardUnit(dataset.place, split, number, shard.index_sha256.hex(), count))
            left -= count
    return units


@dataclass(frozen=True)
class JobUnit:
    """A part of a sampling job, or its first so many images: of a job that has not ended too."""

    job: Job
    part: Part
    index_sha256: str
    count: int

    @property
    def key(self) -> str:
        return f"{self.index_sha256[:32]}-{self.count}"

    def read(self) -> tuple[Pixels, Labels]:
        indices = range(self.part.first, self.part.first + self.count)
        return self.job.pixels(self.part)[: self.count], np.array(self.job.labels(indices), dtype=np.int64)


def units_of_job(job: Job, n: int) -> list[JobUnit]:
    """The first n images of a sampling job, by the chunk. DamageError where they are not all there."""
    units = []
    for part in job.parts_read(n):
        record = job.committed(part)
        if record is None:
            raise DamageError(f"{job.record_of(part)} is missing; the same command makes it again")
        units.append(JobUnit(job, part, record.index_sha256, min(part.count, n - part.first)))
    return units


def nearest_in_features(
    features: Features, units: Sequence[Unit], net: Extractor, store: Place, cluster: Cluster
) -> NDArray[np.float64]:
    """Distances [n] of features [n, d] from the nearest of the units' images, a unit at a time; all are kept: the
    units' own features, and what comes out."""
    folder = features_place(store, net)
    known = {"of": sha256(features.tobytes()), "from": [unit.key for unit in units]}

    def make() -> dict[str, NDArray[np.float64]]:
        nearest_yet = np.full(len(features), np.inf)
        for _, distances in over_kept(functools.partial(_nearest, features, net, folder), units, cluster):
            nearest_yet = np.minimum(nearest_yet, distances)
        return {"distance": nearest_yet}

    return kept_arrays(folder / f"nearest-{identity(known)[:16]}.npz", make)["distance"]


def _nearest(features: Features, net: Extractor, folder: Place, unit: Unit) -> NDArray[np.float64]:
    with torch_threads(1):  # the bits are the same in whatever process
        theirs = kept_arrays(folder / f"{unit.key}.npz", lambda: {"features": net.features(unit.read()[0])})
        return nearest(features, theirs["features"]).distance


def features_place(store: Place, net: Extractor) -> Place:
    """The folder of a network's features."""
    known = {"net": net.digest, "preprocessing": net.preprocessing, "format": _FORMAT}
    return store / "features" / identity(known)[:16]


def read_all(units: Sequence[Unit]) -> tuple[Pixels, Labels]:
    """All images and labels of the units, in this process."""
    parts = [unit.read() for unit in units]
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])
