"""What every source is, and the rules that its labels follow."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.sources.files import refused

NO_LABEL = -1
MAX_CLASSES = 2**20
"""Labels lie below it: the classes 0..max are listed by name, and a few bytes can claim any maximum."""


class Source(Protocol):
    """A sequence of images, in an order that does not change while its files do not.

    It is cheap to open and safe to pickle to another process on the same file system; one thread at a time may use it.
    Any image can be loaded, and consecutive ones quickly.
    """

    @property
    def kind(self) -> str:
        """`digits`, `folder`, `zip`, `tar`, `parquet`, `idx`, `npy`, `npz` or `cifar`."""

    @property
    def name(self) -> str:
        """`digits`, or the absolute path of the folder or file."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label; empty where there are none."""

    def __len__(self) -> int: ...

    def title(self, index: int) -> str:
        """What the image is called in the source, unlike any other; no absolute path."""

    def label(self, index: int) -> int:
        """Label of an image, NO_LABEL where it has none."""

    def split(self, index: int) -> str | None:
        """`train` or `held-out` where the source has a split of its own; otherwise None, for every image."""

    def load(self, index: int) -> Image.Image:
        """Decode one image to mode L or RGB, any size. UserError names one that cannot be."""

    def fingerprint(self) -> str:
        """Hex sha256 that changes when the source does; no image is decoded for it."""


def place(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Part and position in it of an image, where `ends` counts the images up to the end of each part."""
    index = range(ends[-1])[index]  # or an IndexError
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def check_label_array(dtype: "np.dtype[Any]", shape: tuple[int, ...], count: int, called: str) -> None:
    """UserError unless an array of this type and shape can hold one label for each of `count` images."""
    if dtype.kind not in "iu" or shape not in ((count,), (count, 1)):
        raise refused(
            called,
            f"{dtype} of shape {list(shape)} cannot be the labels of {count:,} images; write integers of shape "
            f"[{count}], or leave it out",
        )


def as_labels(values: NDArray[Any], called: str, classes: int = MAX_CLASSES) -> NDArray[np.int32]:
    """Integers [N] or [N, 1] as labels [N]: below `classes`, or NO_LABEL. UserError names the first that is neither."""
    values = values.reshape(-1)
    wrong = np.flatnonzero((values < NO_LABEL) | (values >= classes))
    if len(wrong):
        raise refused(f"{called}/{wrong[0]}", f"label {values[wrong[0]]} is not from 0 to {classes - 1}; correct it")
    return values.astype(np.int32)


def numbered_classes(labels: Iterable[NDArray[np.int32]]) -> tuple[str, ...]:
    """`0`, `1` and so on up to the largest label; nothing where there is none."""
    largest = max((int(array.max()) for array in labels if len(array)), default=NO_LABEL)
    return tuple(str(label) for label in range(largest + 1))
