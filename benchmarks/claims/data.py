"""What is learned from: digits or Fashion-MNIST, each with a held-out split, and how much work it is given."""

import gzip
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.data.sources import Digits
from pipelines.errors import UserError
from pipelines.evaluate.chance import generator
from pipelines.store import sha256

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

_HELD_OUT = 0.4
"""Part of the digits that is held out; Fashion-MNIST has test images."""

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much is done with a data set. All of it is in the recipes of the stages that it decides."""

    images: int
    """Training budget, images seen, unless told."""
    channels: tuple[int, ...]
    groups: int
    batch: int
    learning_rate: float
    samples: int
    """n of the Frechet distances; twice as many held-out images are taken for them."""
    feature_images: int
    feature_epochs: int
    bits_images: int


@dataclass(frozen=True)
class Data:
    """Images uint8 [N, H, W, 1] in a fixed order, and what to do with them."""

    name: str
    train: Pixels
    labels: Labels
    """Of the training images."""
    held_out: Pixels
    held_out_labels: Labels
    work: Work

    @property
    def side(self) -> int:
        return self.train.shape[1]

    @cached_property
    def digest(self) -> str:
        """sha256 over pixels and labels of both splits."""
        arrays = (self.train, self.labels, self.held_out, self.held_out_labels)
        return sha256("".join(sha256(f"{a.dtype} {a.shape}") + sha256(a.tobytes()) for a in arrays))


def load(name: str, folder: Path = FASHION) -> Data:
    """`digits` or `fashion`. UserError where the files of the latter are missing or are something else."""
    return digits() if name == "digits" else fashion(folder)


def digits() -> Data:
    """scikit-learn's 1,797 digits, 8x8; 719 of them, drawn once and for all, are held out."""
    source = Digits()
    count = len(source)
    pixels = np.stack([np.asarray(source.load(i)) for i in range(count)])[..., None]
    labels = np.array([source.label(i) for i in range(count)], dtype=np.int64)
    order = generator(0, "claims-held-out").permutation(count)
    cut = round(_HELD_OUT * count)
    held_out, train = np.sort(order[:cut]), np.sort(order[cut:])
    work = Work(
        images=64_000,
        channels=(32, 64),
        groups=32,
        batch=64,
        learning_rate=1e-3,
        samples=250,
        feature_images=len(train),
        feature_epochs=30,
        bits_images=cut,
    )
    return Data("digits", pixels[train], labels[train], pixels[held_out], labels[held_out], work)


def fashion(folder: Path) -> Data:
    """Fashion-MNIST, 28x28: 60,000 images, and its 10,000 test images held out (Xiao et al. 2017)."""
    train, labels = _idx(folder / "train-images-idx3-ubyte.gz"), _idx(folder / "train-labels-idx1-ubyte.gz")
    held_out, held_labels = _idx(folder / "t10k-images-idx3-ubyte.gz"), _idx(folder / "t10k-labels-idx1-ubyte.gz")
    work = Work(
        images=32_000,
        channels=(8, 16, 32),
        groups=8,
        batch=32,
        learning_rate=2e-3,
        samples=250,
        feature_images=12_000,
        feature_epochs=4,
        bits_images=1000,
    )
    return Data(
        "fashion", train[..., None], labels.astype(np.int64), held_out[..., None], held_labels.astype(np.int64), work
    )


def _idx(file: Path) -> Pixels:
    """An IDX file of bytes: two zeros, the type 8, the number of dimensions, the dimensions, the values."""
    try:
        data = gzip.decompress(file.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing: install Debian's package dataset-fashion-mnist, or give --fashion FOLDER"
        ) from None
    except (OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read ({error}): install dataset-fashion-mnist again") from None
    dimensions = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    start = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], dtype=">u4"))
    if not dimensions or len(shape) != dimensions or len(data) != start + int(np.prod(shape)):
        raise UserError(f"{file} is not an IDX file of bytes: install dataset-fashion-mnist again")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
