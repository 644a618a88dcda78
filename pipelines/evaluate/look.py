"""Images are looked at once, by whichever process: their features, the training image that lies nearest, their class.

What was seen of some images is kept in the store by their digest and those of network and dataset: an evaluation that
was killed goes on, and only new images are looked at.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.evaluate.features import FeatureNet, Pixels, torch_threads
from pipelines.evaluate.frechet import Features
from pipelines.evaluate.kept import kept_arrays, over_kept
from pipelines.evaluate.memory import Nearest, nearest
from pipelines.evaluate.sets import Extractor
from pipelines.evaluate.units import Labels, Unit, read_all, units_of
from pipelines.store import Place, identity

CLOSEST = 16
"""Images of those that lie nearest to training images that are kept, for a picture."""
_FORMAT = 2
"""Of what is kept of a look."""
_IN_MEMORY = 2**29
"""Bytes of training images that a process keeps; more are read again for each look."""


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen of n images, in order."""

    features: Features
    """[n, d]."""
    index: NDArray[np.int64]
    distance: NDArray[np.float64]
    """[n], of the nearest training image, in pixels."""
    labels: Labels
    """[n], -1 for none."""
    guesses: Labels
    """[n], the classes that the network takes them for; -1 of one that knows none."""
    closest: NDArray[np.int64]
    pixels: Pixels
    """Which of them lie nearest to training images, the nearest first, and their pixels."""

    @staticmethod
    def joined(looks: Sequence["Look"]) -> "Look":
        """Of several sets of images, one after another."""
        starts = np.cumsum([0, *(len(look.index) for look in looks)])
        closest = np.concatenate([look.closest + start for look, start in zip(looks, starts, strict=False)])
        pixels = np.concatenate([look.pixels for look in looks])
        distance = np.concatenate([look.distance for look in looks])
        order = np.argsort(distance[closest], kind="stable")[:CLOSEST]
        return Look(
            features=np.concatenate([look.features for look in looks]),
            index=np.concatenate([look.index for look in looks]),
            distance=distance,
            labels=np.concatenate([look.labels for look in looks]),
            guesses=np.concatenate([look.guesses for look in looks]),
            closest=closest[order],
            pixels=pixels[order],
        )


class Looker:
    """Looks at images with one network, beside one dataset's training images. Cheap to send to a process."""

    def __init__(self, net: Extractor, dataset: Dataset, store: Place) -> None:
        self._net, self._place = net, dataset.place
        known = {"net": net.digest, "preprocessing": net.preprocessing, "dataset": dataset.digest, "format": _FORMAT}
        self._kept = store / "looks" / identity(known)[:16]
        side = dataset.image_size**2 * dataset.channels
        self._fits = side * len(dataset.split("train")) <= _IN_MEMORY

    def __call__(self, unit: Unit) -> Look:
        """What there is to see of a unit's images."""
        return self.kept(unit.key, unit.read)

    def kept(self, key: str, read: Callable[[], tuple[Pixels, Labels]]) -> Look:
        """What was seen under a key before, or is seen now of the pixels and labels that `read` gives."""
        arrays = kept_arrays(self._kept / f"{key}.npz", lambda: vars(self.at(*read())))
        return Look(**arrays)

    def at(self, pixels: Pixels, labels: Labels) -> Look:
        """Look at images uint8 [n, H, W, C] with their labels [n]."""
        with torch_threads(1):  # the bits are the same in whatever process
            near = self._nearest(pixels)
            net, guesses = self._net, np.full(len(pixels), -1)
            if isinstance(net, FeatureNet) and net.config.task == "classes":
                guesses = net.guesses(pixels)
            closest = np.argsort(near.distance, kind="stable")[:CLOSEST]
            features = self._net.features(pixels)
        return Look(features, near.index, near.distance, labels, guesses, closest, pixels[closest])

    def _nearest(self, pixels: Pixels) -> Nearest:
        if self._fits:
            return nearest(pixels, self._train[0])
        parts, start = [], 0
        for unit in units_of(Dataset.open(self._place), "train"):
            found = nearest(pixels, unit.read()[0])
            parts.append(Nearest(found.index + start, found.distance))
            start += unit.count
        distance = np.stack([part.distance for part in parts])
        best, each = distance.argmin(0), np.arange(len(pixels))
        return Nearest(np.stack([part.index for part in parts])[best, each], distance[best, each])

    @functools.cached_property
    def _train(self) -> tuple[Pixels, Labels]:
        return read_all(units_of(Dataset.open(self._place), "train"))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_train"}


def look_at(units: Sequence[Unit], looker: Looker, cluster: Cluster) -> Look:
    """All of the units' images."""
    found = dict(over_kept(looker, units, cluster))
    return Look.joined([found[place] for place in range(len(units))])
