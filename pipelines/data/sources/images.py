"""Decoding within limits: an image file, or an array of pixels, becomes a PIL image of mode L or RGB."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.data.sources.files import printable, reason, refused
from pipelines.errors import UserError

MAX_PIXELS = 2**26
"""Largest image that is decoded, pixels: a few bytes of PNG can claim any size."""

MAX_IMAGE_BYTES = 64 * 2**20
"""Largest image file inside an archive or a table, bytes unpacked: a few bytes of zip can claim any size."""

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
SUFFIXES = tuple(_FORMATS)
_FORMAT_NAMES = sorted(set(_FORMATS.values()))


def load_image(path: Path) -> Image.Image:
    """Decode an image file to mode L or RGB, upright. UserError names a file that cannot be decoded.

    Transparency is laid over white; 16-bit grey keeps its upper byte; of an animation the first frame is taken.
    """
    return _decode(path, str(path))


def decode_image(data: bytes, called: str) -> Image.Image:
    """Decode an image file's bytes as `load_image` does. UserError calls it by `called`."""
    return _decode(io.BytesIO(data), called)


def check_image_bytes(size: int, called: str) -> None:
    """UserError where an image file inside another has more than MAX_IMAGE_BYTES."""
    if size > MAX_IMAGE_BYTES:
        raise refused(
            called,
            f"an image of {size:,} bytes is more than the {MAX_IMAGE_BYTES:,} that are read; shrink or remove it",
        )


def check_pixels(width: int, height: int, called: str) -> None:
    """UserError where an image has more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{printable(called)}: {width} x {height} is more than {MAX_PIXELS} pixels; shrink or remove it"
        )


def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """The image of pixels [H, W] or [H, W, C], C = 1 or 3, values 0..255."""
    return Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[2:] == (1,) else pixels))


def is_image(name: str) -> bool:
    """Whether a file's name ends as that of an image does."""
    return name.lower().endswith(SUFFIXES)


def _decode(file: Any, called: str) -> Image.Image:
    try:
        with Image.open(file, formats=_FORMAT_NAMES) as image:
            check_pixels(image.width, image.height, called)
            image.load()
            return upright(image)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged input
        unknown = isinstance(error, UnidentifiedImageError)
        why = f"it is none of {', '.join(_FORMAT_NAMES)}" if unknown else reason(error)
        raise UserError(f"{printable(called)}: cannot be read as an image ({why}); repair or remove it") from None


def upright(image: Image.Image) -> Image.Image:
    """A decoded picture as `load_image` gives it: turned as its EXIF says, mode L or RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        deep = np.asarray(image)
        pixels = (deep >> 8).astype(np.uint8)
        if image.has_transparency_data:  # one value is, and no other
            pixels[deep == image.info["transparency"]] = 255
        return Image.fromarray(pixels)
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")
