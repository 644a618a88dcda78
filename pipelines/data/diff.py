"""What tells two datasets apart: in their recipes, and image by image by the hash of the content."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.inspect import read_classes
from pipelines.data.manifest import SPLITS, Dataset
from pipelines.data.order import Ints
from pipelines.progress import Progress

_RECIPE = ("image_size", "channels", "classes", "decode", "resize", "held_out", "shard_images", "drop_duplicates")
_PIECE = 2**17
"""Images that are compared at once."""
_TRAIN, _HELD_OUT = 1, 2
"""Bits of the splits that a content lies in."""


@dataclass(frozen=True)
class Difference:
    """Dataset B against dataset A. Images are counted by their content: copies of one are one image."""

    same: bool
    """Whether both have one digest: the same pixels and labels, in shards of the same sizes. Then no image is compared,
    and `both` counts copies too."""
    recipe: dict[str, tuple[Any, Any]]
    """Fields that differ: their values in A and in B; `shards`: their number, where the cut into shards differs."""
    only_a: int
    only_b: int
    both: int
    copies: tuple[int, int]
    """Images of A and of B beyond the first of each content."""
    moved: int
    """Of those in both, those that do not lie in the same splits."""
    to_held_out: int
    """Of those moved, those that A has for training alone and B held out alone."""
    to_train: int
    """The reverse."""
    relabelled: int
    """Of those in both, those whose class has another name."""
    classes: list[dict[str, Any]]
    """For each class `class` (None: without one) `a`, `b`: its images in both splits; `only_a`, `only_b`."""


def compare(a: Dataset, b: Dataset, progress: Progress | None = None) -> Difference:
    """Compare two datasets by their cards and indices; no image is decoded.

    Memory: 32 bytes an image of both, and what a piece of them takes. DamageError names an index that is damaged.
    """
    recipe = _compare_recipes(a, b)
    if a.digest == b.digest:
        images = sum(len(a.split(split)) for split in SPLITS)
        return Difference(True, recipe, 0, 0, images, (0, 0), 0, 0, 0, 0, [])
    names = [*dict.fromkeys((*a.classes, *b.classes)), None]
    tally = _Tally(len(names))
    for records in _pieces(_sorted_records(a, b, names, progress or Progress())):
        tally.add(records)
    columns = {"a": tally.images[0], "b": tally.images[1], "only_a": tally.only[0], "only_b": tally.only[1]}
    classes = [
        {"class": name, **{column: int(counts[label]) for column, counts in columns.items()}}
        for label, name in enumerate(names)
        if tally.images[:, label].any()
    ]
    only_a, only_b = tally.only.sum(axis=1).tolist()
    images_a, images_b = tally.images.sum(axis=1).tolist()
    return Difference(
        same=False,
        recipe=recipe,
        only_a=only_a,
        only_b=only_b,
        both=tally.both,
        copies=(images_a - only_a - tally.both, images_b - only_b - tally.both),
        moved=tally.moved,
        to_held_out=tally.to_held_out,
        to_train=tally.to_train,
        relabelled=tally.relabelled,
        classes=classes,
    )


def _compare_recipes(a: Dataset, b: Dataset) -> dict[str, tuple[Any, Any]]:
    fields = {name: (a.card.get(name), b.card.get(name)) for name in _RECIPE}
    cuts = [{split: np.asarray(dataset.split(split).shard_sizes) for split in SPLITS} for dataset in (a, b)]
    if not all(np.array_equal(cuts[0][split], cuts[1][split]) for split in SPLITS):
        one, other = ({split: len(sizes) for split, sizes in cut.items()} for cut in cuts)
        fields["shards"] = (one, other)
    return {name: values for name, values in fields.items() if values[0] != values[1] or name == "shards"}


def _sorted_records(a: Dataset, b: Dataset, names: list[str | None], progress: Progress) -> NDArray[np.uint8]:
    """[N, 32], a row an image of both, sorted: 24 bytes of the content's sha256, then label, dataset and split.

    192 bits tell contents apart as surely as 256 do, for any number of images there can be.
    """
    splits = [(side, split, dataset, dataset.split(split)) for side, dataset in enumerate((a, b)) for split in SPLITS]
    total = sum(len(split) for *_, split in splits)
    records = np.empty((total, 32), dtype=np.uint8)
    done = 0
    for side, name, dataset, split in splits:
        # A label means the name that its dataset gives it; none comes last in both.
        known = np.array([*(names.index(known) for known in dataset.classes), len(names) - 1], dtype=np.uint64)
        low_bits = np.uint64(side << 1 | SPLITS.index(name))
        for number in range(len(split.shard_sizes)):
            index, labels = read_classes(split, number, len(dataset.classes))
            here = records[done : done + len(index)]
            here[:, :24] = _bytes_of(index["content"])[:, :24]
            codes = known[labels] << np.uint64(2) | low_bits
            here[:, 24:] = codes.astype(">u8").view(np.uint8).reshape(-1, 8)
            done += len(index)
            progress.advance(done, total, "images")
    records.view("S32").ravel().sort()  # in place, as bytes
    return records


def _bytes_of(column: Any) -> NDArray[np.uint8]:
    """A column of 32 bytes each, [N, 32], without a Python object for any of them."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint8, offset=chunk.offset * 32, count=len(chunk) * 32)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(chunks or [np.empty(0, np.uint8)]).reshape(-1, 32)


def _pieces(records: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Consecutive pieces of sorted records; no content is in two of them."""
    begins = 0
    while begins < len(records):
        ends = min(begins + _PIECE, len(records))
        while ends < len(records) and (records[ends, :24] == records[ends - 1, :24]).all():
            ends += 1
        yield records[begins:ends]
        begins = ends


class _Tally:
    """Counts over pieces of records; those of a class by its place in the names of both datasets."""

    def __init__(self, classes: int) -> None:
        self.images = np.zeros((2, classes), dtype=np.int64)
        """[dataset, class]: images, copies among them."""
        self.only = np.zeros((2, classes), dtype=np.int64)
        """[dataset, class]: contents that the other dataset has not."""
        self.both = self.moved = self.to_held_out = self.to_train = self.relabelled = 0

    def add(self, records: NDArray[np.uint8]) -> None:
        words = records.view(">u8")  # [n, 4], the last of which is the code
        codes = words[:, 3].astype(np.int64)
        side, split, labels = codes >> 1 & 1, codes & 1, codes >> 2
        firsts = np.flatnonzero(np.append(True, (words[1:, :3] != words[:-1, :3]).any(axis=1)))
        places, lowest, highest = [], [], []
        for one in (0, 1):
            here = side == one
            self.images[one] += np.bincount(labels[here], minlength=self.images.shape[1])
            places.append(np.bitwise_or.reduceat(np.where(here, 1 << split, 0), firsts))
            lowest.append(np.minimum.reduceat(np.where(here, labels, self.images.shape[1]), firsts))
            highest.append(np.maximum.reduceat(np.where(here, labels, -1), firsts))
        for one in (0, 1):
            self.only[one] += self._counts(lowest[one][places[1 - one] == 0])
        both = (places[0] > 0) & (places[1] > 0)
        self.both += int(both.sum())
        self.moved += int((both & (places[0] != places[1])).sum())
        self.to_held_out += int(((places[0] == _TRAIN) & (places[1] == _HELD_OUT)).sum())
        self.to_train += int(((places[0] == _HELD_OUT) & (places[1] == _TRAIN)).sum())
        # Of a content with several labels the first and the last are compared.
        self.relabelled += int((both & ((lowest[0] != lowest[1]) | (highest[0] != highest[1]))).sum())

    def _counts(self, labels: Ints) -> Ints:
        return np.bincount(labels, minlength=self.images.shape[1])
