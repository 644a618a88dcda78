"""A WebDataset shard as bytes: `{key}.png` and `{key}.json` a sample, the same bytes for the same samples."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pack(keys: Sequence[str], pictures: Sequence[bytes], notes: Sequence[Mapping[str, Any]]) -> bytes:
    """Tar bytes of PNG pictures with their notes (JSON), readable by the stock `webdataset` library."""
    from webdataset import TarWriter  # a quarter of a second, and only those who write pay it

    file = io.BytesIO()
    with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
        for key, picture, note in zip(keys, pictures, notes, strict=True):
            text = json.dumps(note, sort_keys=True, ensure_ascii=False)
            tar.write({"__key__": key, "png": picture, "json": text.encode()})
    return file.getvalue()


def unpack(data: bytes) -> NDArray[np.uint8]:
    """The pictures of a shard that this product wrote and whose sha256 was checked, uint8 [N, H, W, C]."""
    images = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.name.endswith(".png"):
                file = tar.extractfile(member)
                assert file is not None
                pixels = np.asarray(Image.open(file, formats=["PNG"]))
                images.append(pixels.reshape(*pixels.shape[:2], -1))
    return np.stack(images)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of pixels [H, W, C], C = 1 or 3; the same bytes for the same pixels."""
    file = io.BytesIO()
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()
