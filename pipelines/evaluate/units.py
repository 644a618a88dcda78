"""Images by the shard, wherever they lie, and their features: worked out by whichever process, and kept by digest.

A unit's key is the digest of its index, which has the content of every image: the features of one network for one key
are always the same, and are read from the store where they were made before.
"""

import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.data.reader import Reader
from pipelines.data.work import over_chunks
from pipelines.evaluate.features import Pixels, torch_threads
from pipelines.evaluate.frechet import Features
from pipelines.evaluate.sets import Extractor
from pipelines.store import DamageError, Place

Labels = NDArray[np.int64]


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


def features_of(units: Sequence[Unit], net: Extractor, cache: Place, cluster: Cluster) -> Features:
    """Features float64 [N, d] of the units' images, in order; kept in the folder `cache`, as many as are made."""
    work = functools.partial(_features, net, cache / net.digest[:16])
    found = dict(over_chunks(work, units, cluster))
    return np.concatenate([found[place] for place in range(len(units))])


def _features(net: Extractor, cache: Place, unit: Unit) -> Features:
    place = cache / f"{unit.key}.npy"
    try:
        return np.load(io.BytesIO(place.read()), allow_pickle=False)
    except FileNotFoundError:
        pass  # nobody has needed them yet
    except (ValueError, EOFError):
        warnings.warn(f"{place}: is damaged, and made again", stacklevel=2)
    with torch_threads(1):  # the bits are the same in whatever process
        features = net.features(unit.read()[0])
    file = io.BytesIO()
    np.save(file, features)
    place.write(file.getvalue())
    return features


def read_all(units: Sequence[Unit]) -> tuple[Pixels, Labels]:
    """All images and labels of the units, in this process."""
    parts = [unit.read() for unit in units]
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])
