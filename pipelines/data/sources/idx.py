"""IDX files, the format of MNIST and its family: images in `*images-idx3-ubyte`, labels in `*labels-idx1-ubyte`.

LeCun, Cortes and Burges, "The MNIST database of handwritten digits": two zero bytes, one for the type of the values,
one for the number of dimensions, then each dimension and the values, all big-endian.
"""

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data.sources.base import as_labels, check_label_array, numbered_classes
from pipelines.data.sources.files import refused, unreadable
from pipelines.data.sources.paths import is_hidden, own_split
from pipelines.data.sources.stacks import Part, Stack, Stacks, Stored, check_stack, check_unpacked, unpack

_NAME = re.compile(
    r"((?P<set>.*?)([-_]|(?=images|labels)))??(?P<role>train|t10k|test)?[-_]?"
    r"(?P<what>images(?=[-.]idx3)|labels(?=[-.]idx1))[-.]idx\d-ubyte(\.gz)?",
    re.IGNORECASE,
)
_ROLES = {"train": "train", "t10k": "held-out", "test": "held-out"}
_UNSIGNED_BYTE = 8


class File(NamedTuple):
    """An IDX file by its name."""

    path: Path
    set: str
    """What stands before the role: it tells data sets in one folder apart."""
    role: str
    what: str


@dataclass(frozen=True)
class Gzipped:
    """A stack that lies in a gzipped IDX file."""

    path: str
    shape: tuple[int, ...]

    def open(self) -> NDArray[np.uint8]:
        return _unpack(Path(self.path), self.shape)


def is_idx(name: str) -> bool:
    """Whether a file's name is that of an IDX file."""
    return not is_hidden(name) and _NAME.fullmatch(name) is not None


def open_idx_file(path: Path) -> Stacks:
    """One file of images, with the labels beside it where they are there."""
    file = _parse(path)
    if file.what != "images":
        raise refused(path, "these are labels; give the file of images, or the folder")
    return _open(path, [file], _named(path.parent))


def open_idx_folder(root: Path) -> Stacks:
    """All files of images in a folder, with their labels, sorted by name. UserError where they are of several sets."""
    files = _named(root)
    images = [file for file in files if file.what == "images"]
    if not images:
        raise refused(root, "IDX labels are there and no images; put the file of images beside them")
    sets = sorted({file.set or "no name" for file in images})
    if len(sets) > 1:
        raise refused(
            root, f"IDX files of several data sets are there ({', '.join(sets)}); give each a folder of its own"
        )
    return _open(root, images, files)


def _parse(path: Path) -> File:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return File(path, (match["set"] or "").lower(), (match["role"] or "").lower(), match["what"].lower())


def _named(folder: Path) -> list[File]:
    """IDX files of a folder, sorted by name. Where one lies there packed and unpacked, it is the unpacked one."""
    files = {}
    # Backwards, so that `images-idx3-ubyte` takes the place of `images-idx3-ubyte.gz`.
    for path in sorted(folder.iterdir(), reverse=True):
        if is_idx(path.name) and path.is_file():
            file = _parse(path)
            files[file.set, file.role, file.what] = file
    return sorted(files.values())


def _open(path: Path, images: Sequence[File], files: Sequence[File]) -> Stacks:
    splits = own_split({file.path.name: _ROLES.get(file.role) for file in images}) or {}
    parts, read = [], []
    for file in images:
        shape = _read_header(file.path, 3)
        check_stack(shape, str(file.path))
        stack = _stack(file.path, shape)
        beside = next((f for f in files if f.what == "labels" and (f.set, f.role) == (file.set, file.role)), None)
        labels = _labels(beside.path, shape[0]) if beside else None
        parts.append(Part(file.path.name, stack, labels, splits.get(file.path.name)))
        read += [file.path, beside.path] if beside else [file.path]
    classes = numbered_classes([part.labels for part in parts if part.labels is not None])
    return Stacks("idx", path, parts, classes, read)


def _stack(path: Path, shape: tuple[int, ...]) -> Stack:
    if path.suffix.lower() == ".gz":
        return Gzipped(str(path), shape)
    return Stored(str(path), _header_size(shape), shape)


def _labels(path: Path, count: int) -> NDArray[np.int32]:
    shape = _read_header(path, 1)
    check_label_array(np.dtype(np.uint8), shape, count, str(path))
    return as_labels(_unpack(path, shape), str(path))


def _read_header(path: Path, dimensions: int) -> tuple[int, ...]:
    """Shape of an IDX file of unsigned bytes, checked against the file's size."""
    try:
        with _opened(path) as stream:
            head = stream.read(4 + 4 * dimensions)
        if head[:2] != b"\0\0":
            raise ValueError("it does not begin as one")
        if head[2] != _UNSIGNED_BYTE or head[3] != dimensions:
            raise ValueError(
                f"values of type 0x{head[2]:02X} in {head[3]} dimensions, not unsigned bytes (0x08) in {dimensions}"
            )
        shape: tuple[int, ...] = struct.unpack(f">{dimensions}I", head[4:])
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise unreadable(path, "an IDX file", error) from None
    size, length = _header_size(shape) + math.prod(shape), path.stat().st_size
    if path.suffix.lower() == ".gz":
        check_unpacked(size, length, str(path))
    elif size != length:
        raise unreadable(path, "an IDX file", f"{length:,} bytes are not the {size:,} that it announces")
    return shape


def _unpack(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """All values of an IDX file, read into memory."""
    try:
        with _opened(path) as stream:
            stream.read(_header_size(shape))
            return unpack(stream, shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise unreadable(path, "an IDX file", error) from None


def _opened(path: Path) -> AbstractContextManager[IO[bytes]]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _header_size(shape: tuple[int, ...]) -> int:
    return 4 + 4 * len(shape)
