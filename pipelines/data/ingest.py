"""Ingest: a source of images becomes a dataset of WebDataset shards.

    scan     decode every image once: its content's hash, or the error that stops all before anything is written
    plan     which image goes into which shard, and the dataset's digest: a pure function of the scan
    write    one shard and its index: a pure function of (source, plan), so that any process may do it
    commit   contact sheet, table of shards and, last, the card

The same images and the same recipe give the same bytes. A killed ingest leaves no card, so nothing of it is taken
for a dataset.
"""

import hashlib
import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.manifest import (
    BEGUN,
    CARD,
    FORMAT,
    INDEX_COLUMNS,
    SHARD_COLUMNS,
    SHARDS,
    SHEET,
    SPLITS,
    Dataset,
    Digest,
    content_hash,
    dataset_digest,
    index_name,
    write_table,
)
from pipelines.data.shards import encode_png, pack
from pipelines.data.sources import NO_LABEL, Source, open_source
from pipelines.errors import UserError
from pipelines.store import Place, check_writable, sha256

Progress = Callable[[int, int], None]

_SHEET_SIDE = 10
_SHEET_CELLS = (48, 128)
"""Small images are enlarged (by whole numbers) towards the first, large ones shrunk to the second, pixels."""


@dataclass(frozen=True)
class Recipe:
    """What is made of the source."""

    image_size: int
    channels: int
    held_out: float
    shard_images: int


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written: images of the source, and the content that the scan saw in each."""

    name: str
    split: str
    items: tuple[int, ...]
    contents: tuple[bytes, ...]


@dataclass(frozen=True)
class Plan:
    """All shards, in order, and the digest that the dataset will have."""

    shards: tuple[ShardPlan, ...]
    digest: str


@dataclass(frozen=True)
class ShardRecord:
    """What was written, and sums over its pixels that the card's mean and deviation are made of."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: Digest
    index_sha256: Digest
    pixel_sum: tuple[int, ...]
    pixel_square_sum: tuple[int, ...]


def ingest(
    source: str | Source,
    out: Place,
    *,
    image_size: int,
    channels: int,
    held_out: float,
    shard_images: int,
    progress: Progress | None = None,
) -> Dataset:
    """Make the dataset of a source in folder `out` and open it.

    Every image is visited twice (scan, write): `progress(done, total)` counts visits. Where `out` already holds
    this very dataset nothing is written; where it holds another one that is refused. UserError names what is
    wrong with the source or the recipe, and then nothing has been written.
    """
    recipe = Recipe(image_size, channels, held_out, shard_images)
    _check(recipe)
    source = open_source(source) if isinstance(source, str) else source
    if source.kind == "folder" and out.path.is_relative_to(source.name):
        raise UserError(f"{out} lies inside data.source, whose images are read; name a folder outside of it")
    total = 2 * len(source)
    report = progress or (lambda done, total: None)

    contents = []
    for index in range(len(source)):
        contents.append(content_hash(pixels_of(source, index, recipe)))
        report(index + 1, total)
    plan = plan_shards(source, contents, recipe)

    if (out / CARD).exists():
        return _same_dataset(out, plan)
    check_writable(out)
    _begin(out, plan)
    records, done = [], len(source)
    for shard in plan.shards:
        records.append(write_shard(source, shard, recipe, out))
        done += len(shard.items)
        report(done, total)
    return commit(source, plan, records, recipe, out)


def pixels_of(source: Source, index: int, recipe: Recipe) -> NDArray[np.uint8]:
    """Pixels [S, S, C] of one image as the dataset holds them: centre square, by area or Lanczos to the size."""
    image = source.load(index).convert("L" if recipe.channels == 1 else "RGB")
    side, size = min(image.size), recipe.image_size
    if image.size != (size, size):
        left, top = (image.width - side) / 2, (image.height - side) / 2
        # Area averaging when shrinking: every pixel of the source counts once, and nothing overshoots.
        method = Image.Resampling.BOX if size <= side else Image.Resampling.LANCZOS
        image = image.resize((size, size), method, box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, recipe.channels)


def is_held_out(content: bytes, share: float) -> bool:
    """Whether an image is kept from training: by its content alone, so that adding images moves none across."""
    return int.from_bytes(content[:8], "little") < int(share * 2**64)


def plan_shards(source: Source, contents: Sequence[bytes], recipe: Recipe) -> Plan:
    """Cut each split, in the order of the source, into shards of `shard_images` (the last may be smaller)."""
    sides: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index, content in enumerate(contents):
        sides["held-out" if is_held_out(content, recipe.held_out) else "train"].append(index)
    for split, items in sides.items():
        if not items:
            raise UserError(
                f"data.held_out: with {recipe.held_out} none of the {len(contents)} images falls to {split}; "
                "change it, or give more (different) images"
            )
    shards = []
    for split, items in sides.items():
        for number, first in enumerate(range(0, len(items), recipe.shard_images)):
            chosen = tuple(items[first : first + recipe.shard_images])
            shards.append(ShardPlan(f"{split}-{number:06d}.tar", split, chosen, tuple(contents[i] for i in chosen)))
    sizes = {split: [len(s.items) for s in shards if s.split == split] for split in SPLITS}
    samples = ((contents[i], source.label(i)) for shard in shards for i in shard.items)
    return Plan(tuple(shards), dataset_digest(sizes, samples))


def write_shard(source: Source, shard: ShardPlan, recipe: Recipe, out: Place) -> ShardRecord:
    """Write one shard and its index into `out`. UserError where the source is no longer what was scanned."""
    keys = [f"{index:09d}" for index in shard.items]
    labels = [source.label(index) for index in shard.items]
    sums = np.zeros((2, recipe.channels), dtype=np.int64)
    pictures = []
    for index, content in zip(shard.items, shard.contents, strict=True):
        pixels = pixels_of(source, index, recipe)
        if content_hash(pixels) != content:
            raise UserError(f"{source.name}: {source.title(index)} changed during the ingest; start it again")
        pictures.append(encode_png(pixels))
        wide = pixels.reshape(-1, recipe.channels).astype(np.int64)
        sums += np.stack([wide.sum(0), (wide * wide).sum(0)])
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
    (out / index_name(shard.name)).write(index_bytes)
    return ShardRecord(
        shard.name,
        shard.split,
        samples=len(keys),
        bytes=len(data),
        sha256=hashlib.sha256(data).digest(),
        index_sha256=hashlib.sha256(index_bytes).digest(),
        pixel_sum=tuple(sums[0].tolist()),
        pixel_square_sum=tuple(sums[1].tolist()),
    )


def commit(source: Source, plan: Plan, records: Sequence[ShardRecord], recipe: Recipe, out: Place) -> Dataset:
    """Write what makes the shards a dataset: contact sheet, table of shards, and the card last."""
    table = write_table(SHARD_COLUMNS, {name: [getattr(r, name) for r in records] for name in SHARD_COLUMNS})
    (out / SHEET).write(contact_sheet(source, plan, recipe))
    (out / SHARDS).write(table)
    mean, deviation = _moments([r for r in records if r.split == "train"], recipe)
    (out / CARD).write_json(
        {
            "format": FORMAT,
            "digest": plan.digest,
            **asdict(recipe),
            "classes": list(source.classes),
            "splits": {split: _count(source, plan, split) for split in SPLITS},
            "mean": mean,
            "std": deviation,
            "source": {"kind": source.kind, "name": source.name},
            "sheet": SHEET,
            "shards_sha256": sha256(table),
        }
    )
    return Dataset.open(out)


def contact_sheet(source: Source, plan: Plan, recipe: Recipe) -> bytes:
    """PNG of up to 100 training images, evenly spaced through them."""
    items = [index for shard in plan.shards if shard.split == "train" for index in shard.items]
    shown = min(len(items), _SHEET_SIDE**2)
    small, large = _SHEET_CELLS
    cell = min(large, recipe.image_size * max(1, small // recipe.image_size))
    method = Image.Resampling.NEAREST if cell >= recipe.image_size else Image.Resampling.BOX
    columns = min(shown, _SHEET_SIDE)
    sheet = Image.new("RGB", (columns * (cell + 2) + 2, -(-shown // columns) * (cell + 2) + 2), "white")
    for place in range(shown):
        pixels = pixels_of(source, items[place * len(items) // shown], recipe)
        picture = Image.fromarray(pixels.squeeze(-1) if recipe.channels == 1 else pixels)
        picture = picture.resize((cell, cell), method)
        sheet.paste(picture, (2 + place % columns * (cell + 2), 2 + place // columns * (cell + 2)))
    return encode_png(np.asarray(sheet))


def _check(recipe: Recipe) -> None:
    if recipe.image_size < 1:
        raise UserError(f"data.image_size: {recipe.image_size} is not a size in pixels; give 1 or more")
    if recipe.channels not in (1, 3):
        raise UserError(f"data.channels: {recipe.channels} is neither 1 (grey) nor 3 (RGB)")
    if not 0 < recipe.held_out < 1:
        raise UserError(f"data.held_out: {recipe.held_out} is not a share between 0 and 1")
    if recipe.shard_images < 1:
        raise UserError(f"data.shard_images: {recipe.shard_images} is not a number of images; give 1 or more")


def _same_dataset(out: Place, plan: Plan) -> Dataset:
    found = Dataset.open(out)
    if found.digest != plan.digest:
        raise UserError(f"{out}: another dataset is here (digest {found.digest[:12]}); name another folder")
    return found


def _begin(out: Place, plan: Plan) -> None:
    """Mark the folder as ours, and clear what an unfinished ingest of something else left in it."""
    ours = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.(tar|parquet)|{SHARDS}|{SHEET}")
    left = [name for name in out.list() if ours.fullmatch(name)]
    if left and not (out / BEGUN).exists():
        raise UserError(f"{out}: {left[0]} is there and not from an unfinished ingest; name an empty folder")
    (out / BEGUN).write_json({"format": FORMAT, "digest": plan.digest})
    # A reader of train-*.tar would take them for part of this dataset.
    planned = {name for shard in plan.shards for name in (shard.name, index_name(shard.name))}
    for name in left:
        if name not in planned:
            (out / name).path.unlink(missing_ok=True)


def _describe(source: Source, index: int) -> dict[str, Any]:
    """The sample's JSON."""
    label = source.label(index)
    fields: dict[str, Any] = {"label": label, "source": source.title(index)}
    return fields if label == NO_LABEL else {**fields, "class": source.classes[label]}


def _offsets(data: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {member.name: member.offset_data for member in tar}


def _count(source: Source, plan: Plan, split: str) -> dict[str, Any]:
    shards = [shard for shard in plan.shards if shard.split == split]
    labels = Counter(source.label(index) for shard in shards for index in shard.items)
    return {
        "samples": sum(len(shard.items) for shard in shards),
        "shards": len(shards),
        "per_class": [labels[label] for label in range(len(source.classes))],
        "unlabelled": labels[NO_LABEL],
    }


def _moments(records: Sequence[ShardRecord], recipe: Recipe) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, pixels in [0, 1]. Integer sums: exact, whatever their order."""
    count = sum(record.samples for record in records) * recipe.image_size**2
    means, deviations = [], []
    for channel in range(recipe.channels):
        total = sum(record.pixel_sum[channel] for record in records)
        squares = sum(record.pixel_square_sum[channel] for record in records)
        means.append(total / count / 255)
        deviations.append((count * squares - total * total) ** 0.5 / count / 255)
    return means, deviations
