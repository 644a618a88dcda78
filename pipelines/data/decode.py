"""From the bytes of a shard's member to pixels: which types are read, and within what limits.

The type is that of the member's last suffix, and its decoder gets no say in the matter. A picture's header is checked
before its pixels are decoded, so one that claims to be huge costs nothing. Nothing is unpickled.
"""

import io
import math
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]
Fit = Callable[[Image.Image], Pixels]
"""Brings a decoded picture of any size and mode to pixels [H, W, C] of the dataset's shape; one that has the dataset's
size and mode, and says nothing else about itself, stays as it is."""
Decode = Callable[[bytes], bytes | bytearray]
"""From a member's bytes to H * W * C bytes of pixels, row by row. Any exception says why it cannot be done."""

MAX_MEMBER_BYTES = 64 * 2**20
MAX_PIXELS = 2**26
"""Of a stored picture that is brought to the dataset's size."""

_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class Decoder:
    """Decodes members to images of one shape, [H, W, C].

    Without `fit` a stored picture must have exactly that size, and be grey (C = 1) or RGB (C = 3).
    """

    def __init__(self, shape: tuple[int, int, int], fit: Fit | None = None) -> None:
        self.shape, self._fit = shape, fit
        height, width, channels = shape
        self._size, self._mode = (width, height), "L" if channels == 1 else "RGB"
        header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0 if channels == 1 else 2, 0, 0, 0])
        self._plain_png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + header
        self._png_row = 1 + width * channels  # the row's filter comes before it
        self._no_filters = bytes(height)
        self._expect_no_filters = True
        jpeg, webp = self._picture("JPEG"), self._picture("WEBP")
        self._any_png = self._picture("PNG")
        self._types: dict[str, Decode] = {
            "png": self._png,
            "jpg": jpeg,
            "jpeg": jpeg,
            "webp": webp,
            "npy": self._npy,
        }

    @property
    def types(self) -> tuple[str, ...]:
        """The suffixes that are read."""
        return tuple(self._types)

    def of(self, member: str) -> Decode | None:
        """The decoder of a member, by its suffix; None where it is of no type that is read."""
        _, dot, suffix = member.rpartition(".")
        return self._types.get(suffix.lower()) if dot else None

    def _png(self, data: bytes) -> bytes | bytearray:
        # Most often a PNG is plain: the one header that fits, its pixels in one chunk, the end. Then Pillow's decoder
        # can have them directly, at half the cost of Pillow's walk through the file; and where no row is filtered,
        # zlib is all it takes, at a third. The chunks' check sums say nothing that the member's sha256 has not said.
        if not (
            data.startswith(self._plain_png)
            and data[37:41] == b"IDAT"
            and int.from_bytes(data[33:37], "big") == len(data) - 57
            and data.endswith(_PNG_END)
        ):
            return self._any_png(data)
        packed = data[41:-16]
        if self._expect_no_filters:
            row, height = self._png_row, self.shape[0]
            pixels = bytearray(zlib.decompressobj().decompress(packed, row * height))
            if len(pixels) == row * height and pixels[::row] == self._no_filters:
                del pixels[::row]
                return pixels
            self._expect_no_filters = False  # datasets are of one kind: this was for nothing once, not each time
        mode = self._mode
        return Image.frombytes(mode, self._size, packed, "zip", (mode, False)).tobytes()

    def _picture(self, kind: str) -> Callable[[bytes], bytes]:
        formats = (kind,)

        def decode(data: bytes) -> bytes:
            try:
                opened = Image.open(io.BytesIO(data), formats=formats)
            except UnidentifiedImageError:  # which says where in memory the bytes lie
                raise ValueError("cannot identify image file") from None
            with opened as image:
                if self._fit is not None:
                    return self._fitted(image)
                if image.size != self._size or image.mode != self._mode:
                    raise ValueError(f"it is {image.mode} {image.width} x {image.height}, the dataset {self.shape}")
                return image.tobytes()

        return decode

    def _npy(self, data: bytes) -> bytes:
        """uint8 [H, W, C], or [H, W] for one channel, in C order."""
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"it is an array file of version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        if dtype != np.uint8 or fortran_order or not 2 <= len(shape) <= 3 or math.prod(shape) == 0:
            raise ValueError(f"it is {dtype} {shape}{' in Fortran order' * fortran_order}, not pixels")
        if len(data) - file.tell() != math.prod(shape):
            raise ValueError(f"it has {len(data) - file.tell()} bytes of pixels, not {math.prod(shape)}")
        full = (*shape, 1)[:3]
        if self._fit is not None:
            if full[2] not in (1, 3):
                raise ValueError(f"it has {full[2]} channels")
            pixels = np.frombuffer(data, np.uint8, offset=file.tell()).reshape(full)
            return self._fitted(Image.fromarray(pixels[:, :, 0] if full[2] == 1 else pixels))
        if full != self.shape:
            raise ValueError(f"it is {shape}, the dataset {self.shape}")
        return data[file.tell() :]

    def _fitted(self, image: Image.Image) -> bytes:
        assert self._fit is not None
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
        pixels = self._fit(image)
        if pixels.shape != self.shape or pixels.dtype != np.uint8:
            raise ValueError(f"it was fitted to {pixels.dtype} {pixels.shape}, the dataset is {self.shape}")
        return pixels.tobytes()
