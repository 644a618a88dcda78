"""A WebDataset shard as bytes: `{key}.png` and `{key}.json` a sample, the same bytes for the same samples."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_UNFILTERED_BYTES = 2048
"""Pixels of smaller pictures are stored as they are, others as PNG's filters predict them from their neighbours.
Unfiltered ones take half the time to read and, at 28 x 28, 2 % more room; at 256 x 256 it would be 85 % more."""


def pack(keys: Sequence[str], pictures: Sequence[bytes], notes: Sequence[Mapping[str, Any]]) -> bytes:
    """Tar bytes of PNG pictures with their notes (JSON), readable by the stock `webdataset` library."""
    from webdataset import TarWriter  # a quarter of a second, and only those who write pay it

    file = io.BytesIO()
    with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
        for key, picture, note in zip(keys, pictures, notes, strict=True):
            text = json.dumps(note, sort_keys=True, ensure_ascii=False)
            tar.write({"__key__": key, "png": picture, "json": text.encode()})
    return file.getvalue()


def members(data: bytes) -> list[tuple[str, bytes]]:
    """Name and bytes of the pictures of a shard that this product wrote and whose sha256 was checked."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.name.endswith(".png"):
                file = tar.extractfile(member)
                assert file is not None
                found.append((member.name, file.read()))
    return found


def unpack(data: bytes) -> NDArray[np.uint8]:
    """The pictures of such a shard, uint8 [N, H, W, C]."""
    images = []
    for _, picture in members(data):
        pixels = np.asarray(Image.open(io.BytesIO(picture), formats=["PNG"]))
        images.append(pixels.reshape(*pixels.shape[:2], -1))
    return np.stack(images)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of pixels [H, W, C], C = 1 or 3; the same bytes for the same pixels."""
    if pixels.size < _UNFILTERED_BYTES:
        return _unfiltered_png(pixels)
    file = io.BytesIO()
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _unfiltered_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of three chunks (header, pixels, end) in which no row is filtered, which Pillow cannot be told to make."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)  # before each row, the number of its filter: none
    rows[:, 1:] = pixels.reshape(height, -1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
