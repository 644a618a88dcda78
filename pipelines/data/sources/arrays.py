"""NumPy's files: an npy of images, or an npz of images and labels under names that data sets use."""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipelines.data.sources.base import as_labels, check_label_array, numbered_classes
from pipelines.data.sources.files import printable, refused, unreadable, zip_data_offset
from pipelines.data.sources.paths import own_split
from pipelines.data.sources.stacks import Part, Stack, Stacks, Stored, check_stack, check_unpacked, unpack
from pipelines.errors import UserError

_LAYOUTS: tuple[tuple[tuple[str, str, str], ...], ...] = (
    (("x_train", "y_train", "train"), ("x_test", "y_test", "held-out")),
    (
        ("train_images", "train_labels", "train"),
        ("val_images", "val_labels", "held-out"),
        ("test_images", "test_labels", "held-out"),
    ),
    (("images", "labels", "train"),),
    (("arr_0", "arr_1", "train"),),
)
"""Images, their labels and their split: as Keras, MedMNIST, many, and ADM's evaluator name them."""


class Header(NamedTuple):
    """What an npy file says of its array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: "np.dtype[Any]"
    length: int
    """Bytes before the array."""


@dataclass(frozen=True)
class Deflated:
    """A stack that lies in an npz, packed."""

    path: str
    member: str
    header: int
    shape: tuple[int, ...]
    fortran: bool

    def open(self) -> NDArray[np.uint8]:
        try:
            with zipfile.ZipFile(self.path) as file, file.open(self.member) as stream:
                stream.read(self.header)
                return unpack(stream, self.shape, self.fortran)
        except Exception as error:  # zipfile raises nearly every kind on damaged input
            raise unreadable(f"{self.path}: {self.member}", "packed images", error) from None


def open_npy(path: Path) -> Stacks:
    """Images of an npy file, mapped: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], C = 1 or 3. They have no labels."""
    with path.open("rb") as stream:
        header = _read_header(stream, str(path))
    _check_images(header, path.stat().st_size, str(path))
    stack = Stored(str(path), header.length, header.shape, header.fortran)
    return Stacks("npy", path, [Part(path.name, stack)], (), [path])


def open_npz(path: Path) -> Stacks:
    """Images and labels of an npz file: mapped where it was saved unpacked, otherwise unpacked in memory."""
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            layout = next((layout for layout in _LAYOUTS if any(images in members for images, _, _ in layout)), None)
            if layout is None:
                raise refused(path, _unknown_names(list(members)))
            layout = tuple(part for part in layout if part[0] in members)
            splits = own_split({images: split for images, _, split in layout}) or {}
            parts = []
            for images, labels, _ in layout:
                stack = _stack(path, file, members[images])
                found = _labels(path, file, members[labels], stack.shape[0]) if labels in members else None
                parts.append(Part(images, stack, found, splits.get(images)))
    except UserError:
        raise
    except Exception as error:  # zipfile raises nearly every kind on damaged input
        raise unreadable(path, "an npz file", error) from None
    classes = numbered_classes([part.labels for part in parts if part.labels is not None])
    return Stacks("npz", path, parts, classes, [path])


def _stack(path: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stack:
    called = f"{path}: {member.filename}"
    with file.open(member) as stream:
        header = _read_header(stream, called)
    _check_images(header, member.file_size, called)
    if member.compress_type == zipfile.ZIP_STORED:
        offset = zip_data_offset(path, member.header_offset) + header.length
        if offset + member.file_size - header.length > path.stat().st_size:
            raise unreadable(called, "images", "the file ends before them")
        return Stored(str(path), offset, header.shape, header.fortran)
    if member.compress_type != zipfile.ZIP_DEFLATED:
        raise refused(called, f"is packed by method {member.compress_type}; save it with np.savez")
    check_unpacked(member.file_size, min(member.compress_size, path.stat().st_size), called)
    return Deflated(str(path), member.filename, header.length, header.shape, header.fortran)


def _labels(path: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo, count: int) -> NDArray[np.int32]:
    called = f"{path}: {member.filename}"
    with file.open(member) as stream:
        header = _read_header(stream, called)
    # Before they are read: the header alone says how much is allocated.
    check_label_array(header.dtype, header.shape, count, called)
    with file.open(member) as stream:
        return as_labels(npy.read_array(stream, allow_pickle=False), called)


def _read_header(stream: IO[bytes], called: str) -> Header:
    try:
        version = npy.read_magic(stream)
        if version != (1, 0):  # later ones are for structures, with headers of up to 4 GiB
            raise ValueError(f"format {'.'.join(map(str, version))} is not that of plain arrays")
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
    except Exception as error:  # the header is a literal of Python, whose parser has errors of its own
        raise unreadable(called, "an npy file", error) from None
    return Header(shape, fortran, dtype, stream.tell())


def _check_images(header: Header, size: int, called: str) -> None:
    """UserError unless a file of `size` bytes holds images as its header says."""
    if header.dtype != np.uint8:
        fix = " (floats in 0..1: multiply by 255, round and convert)" if header.dtype.kind == "f" else ""
        raise refused(called, f"values are {header.dtype}; save uint8, 0..255, instead{fix}")
    check_stack(header.shape, called)
    if len(header.shape) == 3 and header.shape[2] in (1, 3):
        height, width, channels = header.shape
        raise refused(
            called,
            f"shape {list(header.shape)} looks like one image, its channels last; write [1, {height}, {width}, "
            f"{channels}], or [{height}, {width}, {channels}, 1] where it is {height:,} grey ones",
        )
    if size != header.length + math.prod(header.shape):
        raise unreadable(
            called,
            "images",
            f"{size - header.length:,} bytes are not the {math.prod(header.shape):,} of shape {list(header.shape)}",
        )


def _unknown_names(found: list[str]) -> str:
    images = ", ".join("/".join(part[0] for part in layout) for layout in _LAYOUTS)
    labels = ", ".join("/".join(part[1] for part in layout) for layout in _LAYOUTS)
    listed = ", ".join(printable(name) for name in found[:10]) + (", ..." if len(found) > 10 else "")
    return (
        f"no array of images among {listed or 'none at all'}; name it one of {images}, and its labels accordingly "
        f"{labels}"
    )
