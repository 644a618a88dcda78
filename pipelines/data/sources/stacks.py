"""Images of one size, stacked in arrays of bytes: what npy, npz, IDX and CIFAR files have in common."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.sources.base import NO_LABEL, place
from pipelines.data.sources.files import fingerprint, refused, unreadable
from pipelines.data.sources.images import check_pixels, picture

MAX_UNPACKED = 2**32
"""Largest stack that is unpacked into memory, bytes. One that is not packed is mapped, and may have any size."""
_DEFLATE = 1032
"""Deflate, which gz and npz use, packs no better than 1032 bytes into one."""
_CHUNK = 2**20


class Stack(Protocol):
    """Where the bytes of a stack of images lie. It is opened when first read, in each process anew."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W], [N, H, W, C] or [N, C, H, W], C = 1 or 3."""

    def open(self) -> NDArray[np.uint8]:
        """The stack as an array of its shape, mapped or in memory. UserError where the file is damaged."""


@dataclass(frozen=True)
class Stored:
    """A stack that lies unpacked in a file."""

    path: str
    offset: int
    shape: tuple[int, ...]
    fortran: bool = False
    """Whether the first axis, not the last, is the one that changes fastest."""
    skip: int = 0
    """Bytes before each image."""

    def open(self) -> NDArray[np.uint8]:
        try:
            if self.fortran:
                return np.asarray(np.memmap(self.path, np.uint8, "r", self.offset, self.shape, "F"))
            rows = (self.shape[0], self.skip + math.prod(self.shape[1:]))
            mapped = np.asarray(np.memmap(self.path, np.uint8, "r", self.offset, rows))
            return mapped[:, self.skip :].reshape(self.shape)
        except (OSError, ValueError) as error:
            raise unreadable(self.path, "a stack of images", error) from None


@dataclass(frozen=True, eq=False)
class Part:
    """A stack of images with what is known of them."""

    title: str
    stack: Stack
    labels: NDArray[np.int32] | None = None
    """[N]; None where they have none."""
    split: str | None = None


class Stacks:
    """The images of one or more stacks, in their order; `files`, of one folder, are all that they were made of.

    Of packed stacks the one that is being read is in memory.
    """

    def __init__(
        self, kind: str, path: Path, parts: Sequence[Part], classes: tuple[str, ...], files: Sequence[Path]
    ) -> None:
        self.kind = kind
        self.name = str(path)
        self.classes = classes
        self._parts = tuple(parts)
        self._ends = tuple(accumulate(part.stack.shape[0] for part in parts))
        self._folder = str(path if path.is_dir() else path.parent)
        self._files = tuple(file.name for file in files)
        self._open: tuple[int, NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def title(self, index: int) -> str:
        number, position = place(self._ends, index)
        return f"{self._parts[number].title}/{position}"

    def label(self, index: int) -> int:
        number, position = place(self._ends, index)
        labels = self._parts[number].labels
        return NO_LABEL if labels is None else int(labels[position])

    def split(self, index: int) -> str | None:
        return self._parts[place(self._ends, index)[0]].split

    def load(self, index: int) -> Image.Image:
        number, position = place(self._ends, index)
        stack = self._parts[number].stack
        if self._open is None or self._open[0] != number:
            self._open = None  # two packed stacks need not be in memory at once
            self._open = (number, stack.open())
        pixels = self._open[1][position]
        return picture(pixels.transpose(1, 2, 0) if channels_first(stack.shape) else pixels)

    def fingerprint(self) -> str:
        return fingerprint(self._folder, self._files)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether a stack is [N, C, H, W]. A shape that can be read both ways has its channels last."""
    return len(shape) == 4 and shape[3] not in (1, 3)


def check_stack(shape: tuple[int, ...], called: str) -> None:
    """UserError unless a stack of this shape has images that are read."""
    if len(shape) == 4 and (shape[3] in (1, 3) or shape[1] in (1, 3)):
        height, width = shape[2:] if channels_first(shape) else shape[1:3]
    elif len(shape) == 3:
        height, width = shape[1:]
    else:
        raise refused(
            called,
            f"shape {list(shape)} is not that of images; write [N, H, W], or [N, H, W, C] with 1 or 3 channels",
        )
    if min(shape) < 1:
        raise refused(called, f"no image in shape {list(shape)}; give one that has some")
    check_pixels(width, height, f"data.source: {called}")


def check_unpacked(size: int, packed: int, called: str) -> None:
    """UserError where `packed` bytes of deflate cannot be unpacked to `size`, or not in memory."""
    if size > packed * _DEFLATE:
        raise unreadable(called, "packed images", f"{packed:,} bytes cannot hold the {size:,} that it announces")
    if size > MAX_UNPACKED:
        raise refused(
            called, f"{size:,} bytes are more than the {MAX_UNPACKED:,} that are unpacked in memory; unpack it first"
        )


def unpack(stream: IO[bytes], shape: tuple[int, ...], fortran: bool = False) -> NDArray[np.uint8]:
    """Read an array that is all that is left of a stream. ValueError where there is less, or more."""
    data = np.empty(math.prod(shape), np.uint8)
    filled = 0
    while chunk := stream.read(min(_CHUNK, len(data) - filled + 1)):
        if filled + len(chunk) > len(data):
            raise ValueError("it has more bytes than it announces")
        data[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    if filled < len(data):
        raise ValueError("it has fewer bytes than it announces")
    return data.reshape(shape, order="F" if fortran else "C")
