"""Datasets written by hand, without ingest: small whole ones, damaged ones, and tables of shards without the shards."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.data.manifest import (
    CARD,
    FORMAT,
    INDEX_COLUMNS,
    SHARD_COLUMNS,
    SHARDS,
    SPLITS,
    Dataset,
    content_hash,
    dataset_digest,
    write_table,
)
from pipelines.data.shards import encode_png, pack
from pipelines.data.verify import verify
from pipelines.store import Place, sha256

Images = tuple[np.ndarray, Sequence[int]]
"""Pixels [N, S, S, C] and a label each, -1 for none."""


def noise(n: int, size: int = 6, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def write_dataset(
    root: Path, train: Images, held_out: Images, classes: Sequence[str] = (), shard_images: int = 5, **fields: Any
) -> Dataset:
    """A dataset as ingest would leave it; `fields` go into the card."""
    place = Place.of(root)
    rows, samples, sizes = [], [], {}
    for split, (images, labels) in zip(SPLITS, (train, held_out), strict=True):
        firsts = range(0, len(images), shard_images)
        sizes[split] = [len(images[first : first + shard_images]) for first in firsts]
        for number, first in enumerate(firsts):
            cut = slice(first, first + shard_images)
            rows.append(
                {"split": split, **write_shard(place, f"{split}-{number:06d}", images[cut], labels[cut], classes)}
            )
            samples += [(content_hash(i), label) for i, label in zip(images[cut], labels[cut], strict=True)]
    table = write_table(SHARD_COLUMNS, {name: [row[name] for row in rows] for name in SHARD_COLUMNS})
    (place / SHARDS).write(table)
    images = train[0]
    card = {
        "format": FORMAT,
        "digest": dataset_digest(sizes, samples),
        "image_size": images.shape[1],
        "channels": images.shape[3],
        "held_out": 0.2,
        "shard_images": shard_images,
        "classes": list(classes),
        "splits": {
            split: {
                "samples": len(labels),
                "shards": len(sizes[split]),
                "per_class": [sum(label == c for label in labels) for c in range(len(classes))],
                "unlabelled": sum(label == -1 for label in labels),
            }
            for split, (_, labels) in zip(SPLITS, (train, held_out), strict=True)
        },
        "mean": (images.mean((0, 1, 2)) / 255).tolist(),
        "std": (images.std((0, 1, 2)) / 255).tolist(),
        "source": {"kind": "folder", "name": "pictures"},
        "decode": "exact",
        "tars": None,
        "shards_sha256": sha256(table),
        **fields,
    }
    (place / CARD).write_json(card)
    return Dataset.open(place)


def write_shard(place: Place, stem: str, images: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> dict:
    """Write one shard and its index; its row of the table of shards."""
    keys = [f"{stem}-{row:04d}" for row in range(len(images))]
    pictures = [encode_png(image) for image in images]
    notes = [{"label": la, **({"class": classes[la]} if la >= 0 else {})} for la in labels]
    data = pack(keys, pictures, notes)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    index = write_table(
        INDEX_COLUMNS,
        {
            "key": keys,
            "member": [f"{key}.png" for key in keys],
            "offset": [offsets[f"{key}.png"] for key in keys],
            "size": [len(picture) for picture in pictures],
            "sha256": [hashlib.sha256(picture).digest() for picture in pictures],
            "content": [content_hash(image) for image in images],
            "label": list(labels),
        },
    )
    (place / f"{stem}.tar").write(data)
    (place / f"{stem}.parquet").write(index)
    return {
        "name": f"{stem}.tar",
        "index": f"{stem}.parquet",
        "samples": len(images),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).digest(),
        "index_sha256": hashlib.sha256(index).digest(),
    }


def read_rows(place: Place, index: str) -> list[dict[str, Any]]:
    """The rows of an index."""
    return pq.read_table(place.path / index).to_pylist()


def change_index(place: Place, index: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change rows of an index, and make every sha256 above it fit, as one who means harm would."""
    rows = read_rows(place, index)
    change(rows)
    (place / index).write(write_table(INDEX_COLUMNS, {name: [row[name] for row in rows] for name in INDEX_COLUMNS}))
    reseal(place)


def reseal(place: Place) -> None:
    """Make the table of shards, and the card's sha256 of it, those of the files as they are."""
    columns = pq.read_table(place.path / SHARDS).to_pydict()
    for row, (name, index) in enumerate(zip(columns["name"], columns["index"], strict=True)):
        data = (place / name).read()
        columns["bytes"][row], columns["sha256"][row] = len(data), hashlib.sha256(data).digest()
        columns["index_sha256"][row] = hashlib.sha256((place / index).read()).digest()
    change_table(place, columns)


def change_table(place: Place, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write another table of shards, with its sha256 in the card."""
    table = write_table(SHARD_COLUMNS, columns)
    (place / SHARDS).write(table)
    change_card(place, shards_sha256=sha256(table))


def change_card(place: Place, **fields: Any) -> None:
    (place / CARD).write_json({**(place / CARD).read_json(), **fields})


def write_made_up(root: Path, shards: int, samples: int) -> Place:
    """A card and a table of shards that are nowhere, all of `samples` images."""
    place = Place.of(root)
    columns = {
        "name": [f"train-{i:06d}.tar" for i in range(shards)],
        "index": [f"train-{i:06d}.parquet" for i in range(shards)],
        "split": ["train"] * shards,
        "samples": [samples] * shards,
        "bytes": [samples * 2048] * shards,
        "sha256": [hashlib.sha256(b"%d" % i).digest() for i in range(shards)],
        "index_sha256": [hashlib.sha256(b"-%d" % i).digest() for i in range(shards)],
    }
    table = write_table(SHARD_COLUMNS, columns)
    (place / SHARDS).write(table)
    counts = {"samples": shards * samples, "shards": shards, "per_class": [], "unlabelled": shards * samples}
    (place / CARD).write_json(
        {
            "format": FORMAT,
            "digest": "0" * 64,
            "image_size": 28,
            "channels": 1,
            "classes": [],
            "splits": {"train": counts, "held-out": {"samples": 0, "shards": 0, "per_class": [], "unlabelled": 0}},
            "mean": [0.5],
            "std": [0.3],
            "source": {"kind": "folder", "name": "made up"},
            "decode": "exact",
            "tars": None,
            "shards_sha256": sha256(table),
        }
    )
    return place


def flip(file: Path, at: int) -> None:
    """Change one bit of a file."""
    patch(file, at, bytes([file.read_bytes()[at] ^ 1]))


def patch(file: Path, at: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(data)


def findings(place: Place) -> list[str]:
    """What verification finds, a line each, without the folder."""
    return [str(finding).removeprefix(f"{place}/") for finding in verify(place).findings]
