"""All that is wrong with one shard: a pure function of its files, so that any process may look.

Nothing that is found stops the search. A finding is told once, by the file and the member that it is about; what
merely follows from it is not told again. Images are decoded by Pillow, whatever the reader does: two decoders must
agree. Pictures that the reader brings to the dataset's size are decoded as they are stored, and have the content of
the index where they have its sha256.
"""

import hashlib
import io
import tarfile
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.headers import Member, ReadAt, open_whole, read_headers
from pipelines.data.index_tar import label_of
from pipelines.data.manifest import (
    INDEX_COLUMNS,
    SHARDS,
    SPLITS,
    Dataset,
    Digest,
    Shard,
    content_hash,
    read_table,
)
from pipelines.data.order import Ints
from pipelines.data.reader import MAX_MEMBER_BYTES
from pipelines.data.sources import NO_LABEL
from pipelines.data.sources.files import reason
from pipelines.data.sources.notes import ENDINGS, LabelError, sample_key
from pipelines.errors import UserError, one_line
from pipelines.files import StorageError
from pipelines.progress import counted
from pipelines.store import DamageError, Place

_MAX_PIXELS = 2**26
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""What pictures that are brought to a size may be, beside arrays (`.npy`); all others are PNG."""

Pixels = NDArray[np.uint8]
Row = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    file: str
    member: str | None
    """The member of a tar that it is about, or none: then it is about the file."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" if self.member is None else f"{self.file}: member {self.member} {self.what}"


@dataclass(frozen=True)
class ShardCheck:
    """What was found in one shard, and what the whole dataset's figures are made of."""

    findings: tuple[Finding, ...]
    images: int
    """Images that were decoded."""
    bytes: int
    """Bytes that were read of the tar."""
    contents: NDArray[np.uint8]
    """[N, 32]: the content hash of each image of the index, as decoded; zeros where it could not be."""
    labels: Ints
    """[N]: the labels of the index."""
    pixels: Ints
    """[C, 256]: how often each value comes in each channel; zeros for pictures that are brought to the size."""
    whole: bool
    """Whether every image was decoded and every label is known."""


def check_shard(dataset: Dataset, shard: Shard) -> ShardCheck:
    """Look at every byte of a shard. `dataset` need not have its table of shards."""
    return _Check(dataset, shard).run()


class _Check:
    def __init__(self, dataset: Dataset, shard: Shard) -> None:
        self.split = dataset.split(SPLITS[0])
        self.exact = self.split.fit is None
        self.shape = (dataset.image_size, dataset.image_size, dataset.channels)
        self.suffixes = (".png",) if self.exact else (*_FORMATS, ".npy")
        self.classes = dataset.classes
        self.ours = dataset.card["tars"] is None
        self.shard = shard
        self.tar = self.split.tars / shard.name
        self.index = self.split.place / shard.index
        self.findings: list[Finding] = []
        self.pixels = np.zeros((dataset.channels, 256), dtype=np.int64)
        self.images = self.bad = self.end = 0

    def run(self) -> ShardCheck:
        rows = self._rows()
        contents = np.zeros((len(rows or ()), 32), dtype=np.uint8)
        size = self._check_tar(rows, contents)
        labels = np.array([row["label"] for row in rows or ()], dtype=np.int64)
        whole = rows is not None and len(rows) == self.images == self.shard.samples
        return ShardCheck(tuple(self.findings), self.images, size, contents, labels, self.pixels, whole)

    def _say(self, what: str, member: str | None = None, file: Place | None = None) -> None:
        self.findings.append(Finding(str(file or self.tar), member and _shown(member), _shown(what)))

    def _rows(self) -> list[Row] | None:
        """The rows of the index; None, and why is said, where they are not what was written."""
        try:
            data = self.index.read()
        except (OSError, StorageError) as error:
            self._say(_unread(error, self.index), file=self.index)
            return None
        if hashlib.sha256(data).digest() != self.shard.index_sha256:
            self._say(f"does not match its sha256 in {SHARDS}", file=self.index)
            return None
        try:
            table = read_table(data, INDEX_COLUMNS, self.index)
            rows: list[Row] = table.to_pylist()
        except (DamageError, UserError, pa.ArrowException, ValueError) as error:
            self._say(one_line(error).removeprefix(f"{self.index}").lstrip(": "), file=self.index)
            return None
        if len(rows) != self.shard.samples:
            self._say(f"has {len(rows):,} samples, {SHARDS} says {self.shard.samples:,}", file=self.index)
        return rows

    def _check_tar(self, rows: list[Row] | None, contents: NDArray[np.uint8]) -> int:
        """All that concerns the tar; `contents` is filled in. Returns its size in bytes, 0 where it cannot be read."""
        try:
            return self._check_members(rows, contents)
        except (OSError, StorageError) as error:
            self._say(_unread(error, self.tar))
            return 0

    def _check_members(self, rows: list[Row] | None, contents: NDArray[np.uint8]) -> int:
        size = self.tar.size()
        read_at, digest = open_whole(self.tar, size)
        if size != self.shard.bytes:
            how = "is cut short" if size < self.shard.bytes else "is longer than it was"
            self._say(f"{how}: it has {size:,} bytes, {SHARDS} says {self.shard.bytes:,}")
        self.end = size
        lost: dict[int, str] = {}
        members = [member for member in read_headers(read_at, size, lost.__setitem__) if member.is_plain]
        if size < self.shard.bytes:  # the header of what is cut off promises more than there is
            lost.pop(max(lost, default=-1), None)
        # A header of zeros ends a tar, and is passed over: then what is behind it is no header.
        names = {row["offset"] - back: row["member"] for row in rows or () for back in (0, tarfile.BLOCKSIZE)}
        for offset, what in lost.items():
            self._say(f"has a header at byte {offset:,} that cannot be read ({what})", names.get(offset))
        if rows is None:
            self._check_unlisted(members, read_at)
        else:
            self._check_rows(rows, members, {names.get(offset) for offset in lost}, read_at, contents)
        if size == self.shard.bytes and digest != self.shard.sha256:
            images = f"damaged: {counted(self.bad, 'image')}" if self.bad else "no damage to the images"
            self._say(f"does not match its sha256 in {SHARDS}; {images} of {self.shard.index}")
        return size

    def _check_rows(
        self,
        rows: list[Row],
        members: list[Member],
        lost: Container[str | None],
        read_at: ReadAt,
        contents: NDArray[np.uint8],
    ) -> None:
        places: dict[str, list[tuple[int, int]]] = {}
        notes: dict[str, dict[str, Member]] = {}
        for member in members:
            places.setdefault(member.name, []).append((member.offset, member.size))
            key, ending = sample_key(member.name) or ("", "")
            if ending in ENDINGS:
                notes.setdefault(key, {})[ending] = member
        listed: set[str] = set()
        for number, row in enumerate(rows):
            name, place = row["member"], (row["offset"], row["size"])
            if name in listed:
                self._say("is in the index twice", name)
            listed.add(name)
            if not name.startswith(f"{row['key']}."):
                self._say(f"has the key {row['key']!r} in the index", name)
            if name not in places:
                if name not in lost and sum(place) <= self.end:
                    self._say("is in the index, but its name is not in the tar", name)
            elif place not in places[name]:
                self._say(f"has {_at(*places[name][0])} in the tar, {_at(*place)} in the index", name)
                place = places[name][0]  # to see whether the image itself is whole
            pixels = self._pixels(name, place, read_at, row["sha256"])
            if pixels is not None:
                content = content_hash(pixels) if self.exact else row["content"]
                contents[number] = np.frombuffer(content, dtype=np.uint8)
                if content != row["content"]:
                    self._say("has other pixels than the content hash in the index", name)
            self._check_label(row, notes.get(row["key"], {}), read_at)
        if self.ours:
            for member in members:
                if member.name.lower().endswith(self.suffixes) and member.name not in listed:
                    self._say("is in the tar, but not in the index", member.name)

    def _check_unlisted(self, members: list[Member], read_at: ReadAt) -> None:
        """What can be said of images without an index: whether they decode."""
        for member in members:
            if member.name.lower().endswith(self.suffixes):
                self._pixels(member.name, (member.offset, member.size), read_at)

    def _pixels(
        self, name: str, place: tuple[int, int], read_at: ReadAt, digest: Digest | None = None
    ) -> Pixels | None:
        """Pixels [H, W, C] of a member as it is stored; None, and why is said, where it has none."""
        try:
            pixels = self._decoded(name, place, read_at, digest)
        except DamageError as error:
            self._say(str(error), name)
            self.bad += 1
            return None
        self.images += 1
        for channel in range(pixels.shape[2] if self.exact else 0):
            self.pixels[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
        return pixels

    def _decoded(self, name: str, place: tuple[int, int], read_at: ReadAt, digest: Digest | None) -> Pixels:
        offset, size = place
        if offset < 0 or not 0 < size <= MAX_MEMBER_BYTES:
            raise DamageError(f"cannot be {_at(offset, size)}, as the index has it")
        if offset + size > self.end:
            raise DamageError("is cut short: the file ends before it")
        data = read_at(offset, size)
        if digest is not None and hashlib.sha256(data).digest() != digest:
            raise DamageError("does not match the sha256 in the index")
        try:
            return _decode(data, self.shape) if self.exact else _decode_any(data, name)
        except Exception as error:  # Pillow's decoders raise nearly every kind
            raise DamageError(f"cannot be decoded: {reason(error)}") from None

    def _check_label(self, row: Row, notes: Mapping[str, Member], read_at: ReadAt) -> None:
        """The label of the index against the classes, and against what the sample's own notes say."""
        label, known = row["label"], len(self.classes)
        if not NO_LABEL <= label < known:
            self._say(f"has the label {label} in the index, where there are {known} classes", row["member"])
            return
        if not notes:
            return
        try:
            said = label_of(read_at, notes)
        except LabelError as error:
            self._say(str(error), notes[error.ending].name)
            return
        if said.number == NO_LABEL and said.passed_over and self.ours:
            for note in notes.values():
                self._say("cannot be read: its label is no whole number", note.name)
            return
        found: int | str = said.number
        if said.number == label != NO_LABEL and said.name is not None:
            label, found = self.classes[label], said.name
        if found != label:
            where = " and ".join(sorted(notes))
            self._say(f"has the label {row['label']} in the index, {found} in its {where}", row["member"])


def _decode(data: bytes, shape: tuple[int, int, int]) -> Pixels:
    """A PNG of exactly this shape. The header is compared before any pixel is decoded."""
    height, width, channels = shape
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.size != (width, height) or image.mode != ("L" if channels == 1 else "RGB"):
            raise ValueError(f"it is {image.mode} {image.width} x {image.height}, the dataset {shape}")
        return np.asarray(image).reshape(shape)


def _decode_any(data: bytes, name: str) -> Pixels:
    suffix = name[name.rfind(".") :].lower()
    if suffix == ".npy":
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise ValueError(f"it is {array.dtype} {array.shape}, not pixels")
        return np.asarray(array)
    if suffix not in _FORMATS:
        raise ValueError(f"it is of no type that is read ({', '.join((*_FORMATS, '.npy'))})")
    with Image.open(io.BytesIO(data), formats=[_FORMATS[suffix]]) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} is more than {_MAX_PIXELS} pixels")
        return np.asarray(image.convert("RGB"))


def _unread(error: OSError | StorageError, file: Place) -> str:
    if isinstance(error, StorageError):
        return str(error).removeprefix(f"{file}").lstrip(": ")
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return "is missing" if missing else f"cannot be read: {error.strerror}"


def _at(offset: int, size: int) -> str:
    return f"{size:,} bytes at {offset:,}"


def _shown(text: str) -> str:
    """A text of a tar as it may go to a terminal: names in it are whatever its maker liked."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
