"""Made-up pictures for the tests of data."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
from PIL import Image

from pipelines.data.manifest import Dataset
from pipelines.data.sources import open_source
from pipelines.errors import UserError

Ingest = Callable[..., Dataset]


def draw_pictures(root: Path, numbers: range) -> None:
    for number in numbers:
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise_picture(number)).save(folder / f"{number:03d}.png")


def noise_picture(number: int, height: int = 12, width: int = 12) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Known(NamedTuple):
    """Images whose pixels, labels and split are known, to be found again in any container."""

    pixels: np.ndarray
    """uint8 [N, H, W] or [N, H, W, 3]."""
    labels: list[int]
    splits: list[str | None]


Written = list[tuple[str, int]]
"""What a container holds, in order: the title of each image, and its number among the known."""


def known_images(count: int = 12, channels: int = 3, classes: int = 3) -> Known:
    """Noise of 32 x 32 pixels; the last third is held out."""
    pixels = np.random.default_rng(5).integers(0, 256, (count, 32, 32, channels), dtype=np.uint8)
    splits: list[str | None] = ["train" if i < count - count // 3 else "held-out" for i in range(count)]
    return Known(pixels.squeeze(-1) if channels == 1 else pixels, [i % classes for i in range(count)], splits)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tree(known: Known) -> dict[str, bytes]:
    """Files of a folder with a split, and below it classes: the path of each, and its bytes."""
    folder = {"train": "train", "held-out": "test"}
    return {
        f"{folder[str(known.splits[i])]}/class{known.labels[i]}/{i % 5}-{i:03d}.png": png(pixels)
        for i, pixels in enumerate(known.pixels)
    }


def in_tree(known: Known) -> Written:
    return sorted((path, i) for i, path in enumerate(tree(known)))


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in files.items():
            file.writestr(name, data)


def write_tar(path: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> None:
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of unsigned bytes; gzipped where its name says so."""
    data = (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def refused(path: Path, message: str, load: int | None = None) -> None:
    """Opening a source, or loading an image of it, is refused in one printable line that names the file."""
    source = open_source(str(path)) if load is not None else None
    with pytest.raises(UserError, match=message) as error:
        source.load(load) if source and load is not None else open_source(str(path))
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400 + len(str(path))


def files_below(root: Path) -> dict[str, bytes]:
    """Path and bytes of every file below a folder, hidden ones too; a folder is a path with a slash at its end."""
    return {
        path.relative_to(root).as_posix() + "/" * path.is_dir(): b"" if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }


def stop_at(count: int) -> Callable[[int, int], None]:
    """A listener of progress that interrupts the work when so much of it is done."""

    def stop(done: int, total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return stop
