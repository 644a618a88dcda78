"""The same grey images as shards and as a folder: Fashion-MNIST where Debian's package has it, else random ones."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.index import index
from pipelines.data.manifest import CARD, Dataset
from pipelines.data.shards import encode_png
from pipelines.store import Place
from tests.data.dataset_helpers import write_dataset

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
"""Debian's dataset-fashion-mnist: 60,000 images, 28 x 28, of 10 classes (Xiao, Rasul and Vollgraf, 2017)."""
SHARD_IMAGES = 1000
_CLASSES = 10


@dataclass(frozen=True)
class Images:
    """The first `n` images, brought to `size` pixels, in both forms."""

    shards: Place
    folder: Path

    def dataset(self) -> Dataset:
        return Dataset.open(self.shards)

    def urls(self) -> list[str]:
        """The training shards, as the stock library takes them."""
        return [str(self.shards / shard.name) for shard in self.dataset().split("train").shards]

    def files(self) -> list[tuple[str, int]]:
        """Path and label of each file, sorted by class, as the usual folder classes list them."""
        return [(str(path), int(path.parent.name)) for path in sorted(self.folder.glob("*/*.png"))]


def prepare(root: Path, n: int, size: int, folder: bool = True) -> Images:
    """Make them below `root`, if an earlier run has not."""
    images = Images(Place.of(root / f"shards-{size}-{n}"), root / f"folder-{size}-{n}")
    if folder and not (images.folder / "done").exists():
        for number, (pixels, label) in enumerate(_pictures(n, size)):
            file = images.folder / str(label) / f"{number:06d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(pixels))
        (images.folder / "done").touch()
    if not (images.shards / CARD).exists():
        pictures, labels = zip(*_pictures(n, size), strict=True)
        train = np.stack(pictures), list(labels)
        held_out = np.stack(pictures[:1]), list(labels[:1])
        names = [str(label) for label in range(_CLASSES)]
        write_dataset(images.shards.path, train, held_out, names, SHARD_IMAGES)
    return images


def prepare_indexed(root: Path, n: int, size: int) -> Images:
    """Shards that the stock library has written, of PNGs as Pillow has them, indexed where they lie."""
    place = Place.of(root / f"indexed-{size}-{n}")
    if not (place / CARD).exists():
        folder = place.path / "train"
        folder.mkdir(parents=True, exist_ok=True)
        with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=SHARD_IMAGES, verbose=0) as shards:
            for number, (pixels, label) in enumerate(_pictures(n, size)):
                picture = Image.fromarray(pixels[..., 0])
                shards.write({"__key__": f"{number:06d}", "png": picture, "json": {"label": label}})
        index(place, image_size=size, channels=1)
    return Images(place, Path())


def _pictures(n: int, size: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Pixels [size, size, 1] and label of each image."""
    pixels, labels = _source(n)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        if size != image.shape[0]:
            image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
        yield image[..., None], label


def _source(n: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if PACKAGE.exists():
        # IDX: 4 bytes of type, then the length of each dimension, 4 bytes each.
        pixels = np.frombuffer(_unpacked("train-images-idx3-ubyte.gz"), dtype=np.uint8, offset=16)
        labels = np.frombuffer(_unpacked("train-labels-idx1-ubyte.gz"), dtype=np.uint8, offset=8)
        return pixels.reshape(-1, 28, 28)[:n], labels[:n]
    random = np.random.default_rng(0)
    labels = random.integers(0, _CLASSES, n, dtype=np.uint8)
    return random.integers(0, 256, (n, 28, 28), dtype=np.uint8), labels


def _unpacked(name: str) -> bytes:
    with gzip.open(PACKAGE / name) as file:
        return file.read()
