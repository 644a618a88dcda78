"""What is made of a source of images: size, channels, shards, and which images are kept from training."""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.sources.images import upright
from pipelines.errors import UserError

Resize = Literal["auto", "area", "lanczos"]
_METHODS = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The fields of `data` that decide a dataset's content. UserError, naming the field, for one that cannot be."""

    image_size: int
    """Side of the square images, pixels."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    held_out: float
    """Share of the images kept from training, where the source has no split of its own."""
    shard_images: int
    """Images a shard."""
    resize: Resize = "auto"
    """Area averaging or Lanczos; auto is area where an image shrinks, Lanczos where it grows."""
    drop_duplicates: bool = False
    """Whether of images with the same pixels one is kept."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"data.image_size: {self.image_size} is not a size in pixels; give 1 or more")
        if self.channels not in (1, 3):
            raise UserError(f"data.channels: {self.channels} is neither 1 (grey) nor 3 (RGB)")
        if not 0 <= self.held_out < 1:
            raise UserError(f"data.held_out: {self.held_out} is not a share of the images, 0 or more and less than 1")
        if self.shard_images < 1:
            raise UserError(f"data.shard_images: {self.shard_images} is not a number of images; give 1 or more")
        if self.resize not in ("auto", *_METHODS):
            raise UserError(f"data.resize: {self.resize} is neither auto, area nor lanczos")

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Pixels [S, S, C] of an image as the dataset holds them: its centre square, brought to the size."""
        return _square(image, self.image_size, self.channels, self.resize)


def fit_stored(image: Image.Image, image_size: int, channels: int, resize: Resize) -> NDArray[np.uint8]:
    """Pixels [S, S, C] of a picture as it lies in somebody's tar: what an ingest of it would have made."""
    return _square(upright(image), image_size, channels, resize)


def _square(image: Image.Image, size: int, channels: int, resize: Resize) -> NDArray[np.uint8]:
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if side == size:  # by whole pixels, for nothing is to be made up between them
        image = image.crop((ceil(left), ceil(top), ceil(left) + side, ceil(top) + side))
    else:
        # Area averaging when shrinking: every pixel of the source counts once, and nothing overshoots.
        kind = resize if resize != "auto" else "area" if size <= side else "lanczos"
        image = image.resize((size, size), _METHODS[kind], box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, channels)


def is_held_out(content: bytes, share: float) -> bool:
    """Whether an image is kept from training: by its content alone, so that adding images moves none across."""
    return int.from_bytes(content[:8], "little") < int(share * 2**64)
