"""Writes one shard and its index: a pure function of (source, recipe, plan), so that any process may do it.

A record of what was written follows, last: a shard that has one, and is still what it says, is done.
"""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.manifest import FORMAT, INDEX_COLUMNS, content_hash, write_table
from pipelines.data.plan import ShardPlan
from pipelines.data.recipe import Recipe
from pipelines.data.shards import encode_png, pack
from pipelines.data.site import RECORDS
from pipelines.data.sources import NO_LABEL, Source
from pipelines.errors import UserError
from pipelines.store import Place, identity, sha256


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
    labels: Mapping[int, int]
    """Images of each label that is there, NO_LABEL among them."""


def write_shard(source: Source, recipe: Recipe, out: Place, shard: ShardPlan) -> ShardRecord:
    """Write one shard, its index and its record into `out`, unless an earlier attempt has written these very ones.

    UserError where the source is not what was scanned.
    """
    file, plan = out / RECORDS / "done" / f"{shard.name}.json", _identity(source, shard)
    if (record := _finished(file, out, plan)) is not None:
        return record
    file.delete()  # what it tells of is about to be written over
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
    notes = [_describe(source, index) for index in shard.items]
    rows = Rows(keys, pictures, notes, shard.contents, labels)
    record = commit_shard(out, shard.name, shard.index, shard.split, rows, sums)
    file.write_json({"plan": plan, "record": asdict(record)})
    return record


@dataclass(frozen=True)
class Rows:
    """What goes into a shard, sample by sample."""

    keys: Sequence[str]
    pictures: Sequence[bytes]
    """PNG files."""
    notes: Sequence[Mapping[str, Any]]
    contents: Sequence[bytes]
    """Of each, the `content_hash` of its pixels."""
    labels: Sequence[int]


def commit_shard(out: Place, name: str, index: str, split: str, rows: Rows, sums: "Sums") -> ShardRecord:
    """Write a shard and then its index. `sums` are those of its pixels."""
    data = pack(rows.keys, rows.pictures, rows.notes)
    offsets = _offsets(data)
    members = [f"{key}.png" for key in rows.keys]
    index_bytes = write_table(
        INDEX_COLUMNS,
        {
            "key": rows.keys,
            "member": members,
            "offset": [offsets[member] for member in members],
            "size": [len(picture) for picture in rows.pictures],
            "sha256": [hashlib.sha256(picture).digest() for picture in rows.pictures],
            "content": list(rows.contents),
            "label": rows.labels,
        },
    )
    (out / name).write(data)
    (out / index).write(index_bytes)
    return ShardRecord(
        name=name,
        index=index,
        split=split,
        samples=len(members),
        bytes=len(data),
        sha256=sha256(data),
        index_sha256=sha256(index_bytes),
        pixel_sum=sums.total,
        pixel_square_sum=sums.squares,
        labels=dict(sorted(Counter(rows.labels).items())),
    )


def record_of(fields: Mapping[str, Any]) -> ShardRecord:
    """A record that was kept as JSON. KeyError, TypeError or ValueError for what is none."""
    sums = {name: tuple(fields[name]) for name in ("pixel_sum", "pixel_square_sum")}
    return ShardRecord(**{**fields, **sums, "labels": whole_numbers(fields["labels"])})


def is_whole(out: Place, record: ShardRecord) -> bool:
    """Whether shard and index are there, byte by byte."""
    try:
        return (
            sha256((out / record.name).read()) == record.sha256
            and sha256((out / record.index).read()) == record.index_sha256
        )
    except FileNotFoundError:
        return False


def whole_numbers(counts: Mapping[str, Any]) -> dict[int, Any]:
    """A mapping of labels as it was before JSON made texts of them."""
    return {int(label): value for label, value in counts.items()}


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


def _identity(source: Source, shard: ShardPlan) -> str:
    """Of all that a shard's bytes depend on: an earlier attempt may have seen other labels, classes or titles."""
    return identity(
        {
            "format": FORMAT,
            "name": shard.name,
            "items": shard.items,
            "contents": [content.hex() for content in shard.contents],
            "notes": [_describe(source, index) for index in shard.items],
        }
    )


def _finished(file: Place, out: Place, plan: str) -> ShardRecord | None:
    """The record in a file, if it is of this plan and its shard and index are there, byte by byte."""
    try:
        found = file.read_json()
    except FileNotFoundError:
        return None
    if found["plan"] != plan:
        return None
    record = record_of(found["record"])
    return record if is_whole(out, record) else None


def _describe(source: Source, index: int) -> dict[str, Any]:
    """The sample's JSON."""
    label = source.label(index)
    fields: dict[str, Any] = {"label": label, "source": source.title(index)}
    return fields if label == NO_LABEL else {**fields, "class": source.classes[label]}


def _offsets(data: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {member.name: member.offset_data for member in tar}
