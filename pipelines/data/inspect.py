"""What a dataset is, told and shown: `ddpm data info` and `ddpm data preview`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data import shuffle
from pipelines.data.card import sheet_of
from pipelines.data.manifest import CARD, SPLITS, Dataset, Split, read_index
from pipelines.data.order import Ints
from pipelines.data.reader import Reader
from pipelines.data.sources import NO_LABEL
from pipelines.store import DamageError


def info(dataset: Dataset, *, window: int = 4, seed: int = 0, batch: int = 64) -> dict[str, Any]:
    """The card, the size of the shards, and how well training with these settings would shuffle.

    Of the shards only some indices are read, where there are labels. DamageError names one that is damaged, or the card
    where it does not count the images.
    """
    for name in SPLITS:
        _counts(dataset, name)
    size = sum(dataset.table["bytes"].to_pylist())
    quality = shuffle_of(dataset, window, seed, batch).to_json()
    return {"dataset": str(dataset.place), **dataset.card, "bytes": size, "shuffle": quality}


def shuffle_of(dataset: Dataset, window: int, seed: int, batch: int) -> shuffle.Shuffle:
    """How well the training order shuffles."""
    split = dataset.split("train")
    classes = len(dataset.classes)
    counts = _counts(dataset, split.name)

    def labels_of(number: int) -> Ints:
        return read_classes(split, number, classes)[1]

    order = split.order(window, seed)
    return shuffle.measure(order, batch, [*counts["per_class"], counts["unlabelled"]], labels_of if classes else None)


def _counts(dataset: Dataset, split: str) -> Mapping[str, Any]:
    """What the card counts of a split. DamageError where that is not there."""
    try:
        counts = dataset.card["splits"][split]
        numbers = [counts[name] for name in ("samples", "shards", "unlabelled")] + [*counts["per_class"]]
    except (KeyError, TypeError):
        numbers = [None]
    if not all(isinstance(number, int) for number in numbers):
        raise DamageError(f"{dataset.place / CARD} does not count the images of the split {split}")
    return dict(counts)


def read_classes(split: Split, number: int, classes: int) -> tuple[pa.Table, Ints]:
    """The index of a shard, and the class of each row, 0..classes-1, `classes` where it has none.

    DamageError names an index that is not what was written, or has other labels.
    """
    shard = split.shard(number)
    index = read_index(split, shard)
    labels = index["label"].to_numpy()
    if len(labels) and not NO_LABEL <= labels.min() <= labels.max() < classes:
        raise DamageError(f"{split.place / shard.index} has labels beyond the {classes} classes")
    return index, np.where(labels == NO_LABEL, classes, labels)


def preview(dataset: Dataset, split: str, n: int, *, window: int = 4, seed: int = 0) -> bytes:
    """PNG of the first `n` images of a split in the order of training (fewer where it has fewer), in rows of ten."""
    images = dataset.split(split)
    order = images.order(window, seed)
    pixels, _ = Reader(images, cache_bytes=0).read(*order.locate(np.arange(min(n, len(images)))))
    return sheet_of(list(pixels))
