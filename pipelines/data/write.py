"""Writes one shard and its index: a pure function of (source, recipe, plan), so that any process may do it.

A record of what was written follows, last: a shard that has one is done, and an ingest that goes on leaves it alone.
"""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.manifest import INDEX_COLUMNS, content_hash, write_table
from pipelines.data.plan import ShardPlan
from pipelines.data.recipe import Recipe
from pipelines.data.shards import encode_png, pack
from pipelines.data.sources import NO_LABEL, Source
from pipelines.errors import UserError
from pipelines.store import Place, sha256

DONE = "done"
"""Folder of the records, while the ingest lasts."""


@dataclass(frozen=True)
class ShardRecord:
    """What was written, and sums over its pixels and labels that the card's figures are made of."""

    name: str
    index: str
    split: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    pixel_sum: tuple[int, ...]
    pixel_square_sum: tuple[int, ...]
    per_class: tuple[int, ...]
    unlabelled: int


def write_shard(source: Source, recipe: Recipe, out: Place, shard: ShardPlan) -> ShardRecord:
    """Write one shard, its index and its record into `out`. UserError where the source is not what was scanned."""
    labels = [source.label(index) for index in shard.items]
    sums = Sums(recipe.channels)
    pictures = []
    for index, content in zip(shard.items, shard.contents, strict=True):
        pixels = recipe.pixels(source.load(index))
        if content_hash(pixels) != content:
            raise UserError(f"{source.name}: {source.title(index)} changed during the ingest; start it again")
        pictures.append(encode_png(pixels))
        sums.add(pixels)
    keys = [f"{index:09d}" for index in shard.items]
    data = pack(keys, pictures, [_describe(source, index) for index in shard.items])
    offsets = _offsets(data)
    members = [f"{key}.png" for key in keys]
    index_bytes = write_table(
        INDEX_COLUMNS,
        {
            "key": keys,
            "member": members,
            "offset": [offsets[member] for member in members],
            "size": [len(picture) for picture in pictures],
            "sha256": [hashlib.sha256(picture).digest() for picture in pictures],
            "content": list(shard.contents),
            "label": labels,
        },
    )
    (out / shard.name).write(data)
    (out / shard.index).write(index_bytes)
    per_class, unlabelled = count_labels(labels, len(source.classes))
    record = ShardRecord(
        name=shard.name,
        index=shard.index,
        split=shard.split,
        samples=len(keys),
        bytes=len(data),
        sha256=sha256(data),
        index_sha256=sha256(index_bytes),
        pixel_sum=sums.total,
        pixel_square_sum=sums.squares,
        per_class=per_class,
        unlabelled=unlabelled,
    )
    _record(out, shard).write_json({"plan": shard.identity, "record": asdict(record)})
    return record


def written(out: Place, shard: ShardPlan) -> ShardRecord | None:
    """The record of a shard that an earlier attempt at this very plan has written; None where there is none."""
    try:
        found = _record(out, shard).read_json()
    except FileNotFoundError:
        return None
    if found["plan"] != shard.identity:
        return None
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found["record"].items()
    }
    return ShardRecord(**fields)


def count_labels(labels: Sequence[int], classes: int) -> tuple[tuple[int, ...], int]:
    """Images of each class, and those without one."""
    known = np.asarray([label for label in labels if label != NO_LABEL], dtype=np.int64)
    return tuple(np.bincount(known, minlength=classes).tolist()), len(labels) - len(known)


class Sums:
    """Sums over pixels, channel by channel: whole numbers, exact in whatever order shards are added up."""

    def __init__(self, channels: int) -> None:
        self._sums = np.zeros((2, channels), dtype=np.int64)

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Pixels [H, W, C]."""
        wide = pixels.reshape(-1, self._sums.shape[1]).astype(np.int64)
        self._sums += np.stack([wide.sum(0), (wide * wide).sum(0)])

    @property
    def total(self) -> tuple[int, ...]:
        return tuple(self._sums[0].tolist())

    @property
    def squares(self) -> tuple[int, ...]:
        return tuple(self._sums[1].tolist())


def _record(out: Place, shard: ShardPlan) -> Place:
    return out / DONE / f"{shard.name}.json"


def _describe(source: Source, index: int) -> dict[str, Any]:
    """The sample's JSON."""
    label = source.label(index)
    fields: dict[str, Any] = {"label": label, "source": source.title(index)}
    return fields if label == NO_LABEL else {**fields, "class": source.classes[label]}


def _offsets(data: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {member.name: member.offset_data for member in tar}
