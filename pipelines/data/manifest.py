"""What a dataset is on disk, and how to open one.

    ingest.json           what is being ingested here. Written first: without it a folder's shards are not ours
    dataset.json          the card: digest, counts, classes, size, mean/std, source. Written last: it is the commit
    card.md, sheet.png    the card for people, with a contact sheet
    shards.parquet        the table of shards, one row each: name, index, split, samples, bytes, sha256, index_sha256
    train-000000.tar      WebDataset shards: KEY.png + KEY.json a sample
    train-000000.parquet  that shard's index, one row a sample: key, member, offset, size, sha256, content, label

Opening a dataset reads the card and the table of shards alone. Tars that were there before (`ddpm data index`) may lie
elsewhere, and one of them may have images of both splits: then it has two rows in the table, each with an index.
"""

import functools
import hashlib
import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data.decode import Fit
from pipelines.data.order import Order
from pipelines.data.recipe import fit_stored
from pipelines.errors import UserError, one_line
from pipelines.files import StorageError
from pipelines.s3 import insist
from pipelines.store import DamageError, Place, sha256

FORMAT = 2
CARD = "dataset.json"
BEGUN = "ingest.json"
SHARDS = "shards.parquet"
SHEET = "sheet.png"
CARD_PAGE = "card.md"
BESIDE = "."
"""Where tars lie that were there before, in the folder of the card."""
SPLITS = ("train", "held-out")

_PACKED = 64
_SMALL_TABLE = 16 * 2**20
"""A table takes up to so many times its file's bytes in memory, or so many bytes. Ours take some 2 times, those of
images that are all alike 20."""
_ROW_BYTES = 64
"""The digests of a row alone."""
_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}
"""Of our tables. Others (dictionaries, differences) can unfold without end."""

Digest = bytes
"""A raw sha256, 32 bytes."""

_CARD_FIELDS = (
    "digest",
    "image_size",
    "channels",
    "classes",
    "splits",
    "mean",
    "std",
    "shards_sha256",
    "decode",
    "tars",
)
SHARD_COLUMNS = {
    "name": pa.string(),
    "index": pa.string(),
    "split": pa.string(),
    "samples": pa.int64(),
    "bytes": pa.int64(),
    "sha256": pa.binary(32),
    "index_sha256": pa.binary(32),
}
INDEX_COLUMNS = {
    "key": pa.string(),
    "member": pa.string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "sha256": pa.binary(32),
    "content": pa.binary(32),
    "label": pa.int64(),
}


@dataclass(frozen=True)
class Shard:
    """One shard's row in the table."""

    name: str
    """Path of the tar below the place of the tars."""
    index: str
    """File name of its index."""
    samples: int
    bytes: int
    sha256: Digest
    index_sha256: Digest


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    place: Place
    """Where the indices lie."""
    tars: Place
    """Where the tars lie."""
    name: str
    digest: str
    """The dataset's digest."""
    image_size: int
    channels: int
    fit: Fit | None
    """Brings stored pictures to the dataset's size and channels as they are read; None where they have them."""
    table: pa.Table

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @cached_property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(self.table["samples"].to_pylist())

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self.shard(i) for i in range(len(self.table)))

    def shard(self, index: int) -> Shard:
        """One row of the table of shards."""
        row = self.table.slice(index, 1).to_pylist()[0]
        del row["split"]
        return Shard(**row)

    def order(self, window: int, seed: int) -> Order:
        """The order in which training reads this split.

        UserError where it has no images, DamageError where it cannot have an order.
        """
        if not self.shard_sizes:
            raise UserError(f"{self.place}: the split {self.name} has no images; name the other one")
        if min(self.shard_sizes) < 1:
            raise DamageError(f"{self.place / SHARDS} has a shard without samples")
        return Order(self.shard_sizes, window, seed, self.digest)


@dataclass(frozen=True)
class Dataset:
    """An ingested dataset. `card` is dataset.json as it is."""

    place: Place
    card: Mapping[str, Any]
    table: pa.Table

    @staticmethod
    def open(place: Place) -> "Dataset":
        """Open the dataset in a folder, reading its card and its table of shards.

        UserError where there is none, or one of an unknown format; DamageError, naming the file, where one of the
        two is not what was written; StorageError where it cannot be read.
        """
        file = place / CARD
        try:
            card = file.read_json()
        except (FileNotFoundError, NotADirectoryError):
            if not place.exists():
                raise UserError(f"{place}: there is no such folder; a store keeps its datasets in datasets/") from None
            raise UserError(
                f"{place}: no finished dataset here ({CARD} is missing); `ddpm ingest` makes one of images"
            ) from None
        except OSError as error:
            raise StorageError(f"{file}: cannot be read: {one_line(error)}") from None
        except RecursionError:
            raise DamageError(f"{file} is not JSON of ours: it is nested too deeply") from None
        except ValueError as error:
            raise DamageError(f"{file} is not JSON: {error}") from None
        found = card.get("format") if isinstance(card, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{file}: dataset format {found} is not known here, only {FORMAT}; use the version that wrote it"
            )
        if absent := [name for name in _CARD_FIELDS if name not in card]:
            raise DamageError(f"{file} lacks {', '.join(absent)}")
        data = _read(place / SHARDS, card["shards_sha256"], CARD)
        table = read_table(data, SHARD_COLUMNS, place / SHARDS)
        for name in (*table["name"].to_pylist(), *table["index"].to_pylist()):
            # The name is joined to a folder: it must not lead out of it.
            if "\\" in name or ":" in name or any(part in ("", ".", "..") for part in name.split("/")):
                raise DamageError(f"{place / SHARDS} names a shard outside its folder: {name!r}")
        if card["decode"] not in ("exact", "fit"):
            raise DamageError(f"{file}: decode is {card['decode']!r}, neither exact nor fit")
        if card["decode"] == "fit" and card.get("resize") not in ("auto", "area", "lanczos"):
            raise DamageError(f"{file}: resize is {card.get('resize')!r}, neither auto, area nor lanczos")
        return Dataset(place, card, table)

    @property
    def digest(self) -> str:
        """See `dataset_digest`."""
        return str(self.card["digest"])

    @property
    def image_size(self) -> int:
        """Side of the square images, pixels."""
        return int(self.card["image_size"])

    @property
    def channels(self) -> int:
        return int(self.card["channels"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label; empty where there are none."""
        return tuple(self.card["classes"])

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Training images of each class."""
        return tuple(self.card["splits"]["train"]["per_class"])

    def split(self, name: str) -> Split:
        """`train` or `held-out`."""
        if name not in SPLITS:
            raise KeyError(f"there is no split {name!r}, only {', '.join(SPLITS)}")
        mask = pyarrow.compute.equal(self.table["split"], name)
        table = self.table.filter(mask)
        tars = self.place if self.card["tars"] in (None, BESIDE) else Place.of(self.card["tars"])
        size, channels, fit = self.image_size, self.channels, None
        if self.card["decode"] == "fit":
            fit = functools.partial(fit_stored, image_size=size, channels=channels, resize=self.card["resize"])
        return Split(self.place, tars, name, self.digest, size, channels, fit, table)


def content_hash(pixels: NDArray[np.uint8]) -> bytes:
    """sha256 of decoded pixels [H, W, C]: H, W, C as little-endian uint32, then the pixels, row by row."""
    height, width, channels = pixels.shape
    return hashlib.sha256(struct.pack("<III", height, width, channels) + pixels.tobytes()).digest()


def dataset_digest(shard_sizes: Mapping[str, Sequence[int]], samples: Iterable[tuple[bytes, int]]) -> str:
    """Hex sha256 that names a dataset: the shard sizes in order and, sample by sample, decoded pixels and label.

    The bytes, integers little-endian: `ddpm-dataset-1` and a newline; for each split in the order of SPLITS its
    name, a newline, the number of its shards (uint64) and the samples of each (uint64); then for each sample, in
    the order of splits, shards and rows, its `content_hash` (32 bytes, which stand for the pixels, so that shards
    can be hashed apart) and its label (int64, -1 for none). Nothing of it depends on PNG or tar bytes.
    """
    digest = hashlib.sha256(b"ddpm-dataset-1\n")
    for split in SPLITS:
        sizes = shard_sizes[split]
        digest.update(f"{split}\n".encode() + struct.pack(f"<Q{len(sizes)}Q", len(sizes), *sizes))
    for content, label in samples:
        digest.update(content + struct.pack("<q", label))
    return digest.hexdigest()


def write_table(columns: Mapping[str, pa.DataType], rows: Mapping[str, Sequence[Any]]) -> bytes:
    """A Parquet file whose bytes depend on the rows alone; its schema carries the format version."""
    schema = pa.schema(list(columns.items()), metadata={"ddpm.format": str(FORMAT)})
    file = io.BytesIO()
    pq.write_table(pa.table(dict(rows), schema=schema), file, compression="zstd", use_dictionary=False)
    return file.getvalue()


def read_table(data: bytes, columns: Mapping[str, pa.DataType], file: Place) -> pa.Table:
    """The inverse of `write_table`. DamageError names a file that is not such a table, or unfolds to too much."""
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data))
        _check_size(parquet.metadata, len(data), file)
        table = parquet.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DamageError(f"{file} is not a Parquet file: {error}") from None
    found = (table.schema.metadata or {}).get(b"ddpm.format", b"none").decode()
    if found != str(FORMAT):
        raise UserError(f"{file}: format {found} is not known here, only {FORMAT}; use the version that wrote it")
    if table.schema.remove_metadata() != pa.schema(list(columns.items())):
        raise DamageError(f"{file} does not have the columns {', '.join(columns)}")
    if any(column.null_count for column in table.columns):
        raise DamageError(f"{file} has empty fields")
    return table


def _check_size(metadata: Any, packed: int, file: Place) -> None:
    """DamageError for a table that a file of so many bytes cannot honestly hold, before it is unpacked."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    if any(not _ENCODINGS.issuperset(column.encodings) for column in columns):
        raise DamageError(f"{file} is encoded otherwise than tables of ours")
    rows = sum(group.num_rows for group in groups) * _ROW_BYTES  # empty fields take none in the file
    size = max(rows, sum(column.total_uncompressed_size for column in columns))
    if size > max(_SMALL_TABLE, _PACKED * packed):
        raise DamageError(f"{file} would take {size:,} bytes in memory, too many for a file of {packed:,}")


def _read(file: Place, digest: str, record: str) -> bytes:
    """A file whose hex sha256 the file `record` has. DamageError where it is missing or another, StorageError where it
    cannot be read."""

    def checked() -> bytes:
        try:
            data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise DamageError(f"{file} is missing") from None
        except OSError as error:
            raise StorageError(f"{file}: cannot be read: {one_line(error)}") from None
        if sha256(data) != digest:
            raise DamageError(f"{file} does not match the sha256 in {record}")
        return data

    return insist(file, checked)


def read_index(split: Split, shard: Shard) -> pa.Table:
    """A shard's index, checked against the table of shards. DamageError names it where it differs; StorageError where
    it cannot be read."""
    file = split.place / shard.index
    table = read_table(_read(file, shard.index_sha256.hex(), SHARDS), INDEX_COLUMNS, file)
    if len(table) != shard.samples:
        raise DamageError(f"{file} has {len(table)} samples, {SHARDS} says {shard.samples}")
    return table
