"""Where images come from: the bundled digits, or a folder. A source lists its images and decodes any one of them.

A source is cheap to open, and safe to pickle to another process on the same file system.
"""

import gzip
import hashlib
import importlib.util
import io
import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.errors import UserError

NO_LABEL = -1
MAX_PIXELS = 2**26
"""Largest image that is decoded, pixels: a few bytes of PNG can claim any size."""

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}


class Source(Protocol):
    """A sequence of images, in an order that does not change while its files do not."""

    @property
    def kind(self) -> str:
        """`digits` or `folder`."""

    @property
    def name(self) -> str:
        """`digits`, or the folder's absolute path."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label; empty where there are none."""

    def __len__(self) -> int: ...

    def title(self, index: int) -> str:
        """What the image is called in the source; no absolute path."""

    def label(self, index: int) -> int:
        """Label of an image, NO_LABEL where it has none."""

    def load(self, index: int) -> Image.Image:
        """Decode one image to mode L or RGB, any size. UserError names one that cannot be."""

    def fingerprint(self) -> str:
        """Hex sha256 that changes when the source does; no image is decoded for it."""


def open_source(source: str) -> Source:
    """`digits`, or the path of a folder of images. UserError where there is none, or no image in it."""
    if source == "digits":
        return Digits()
    root = Path(source).expanduser().absolute()
    if not root.exists():
        raise UserError(f"data.source: there is no {root}; give a folder of images, or `digits`")
    if not root.is_dir():
        raise UserError(f"data.source: {root} is not a folder; give the folder that holds the images, or `digits`")
    return Folder(str(root), _image_files(root))


class Digits:
    """Handwritten digits bundled with scikit-learn: 1,797 grey images, 8 x 8, values 0..16 scaled to 0..255.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (CC BY 4.0).
    """

    kind = "digits"
    name = "digits"
    classes = tuple("0123456789")

    def __len__(self) -> int:
        return len(self._table)

    def title(self, index: int) -> str:
        return f"digits/{index}"

    def label(self, index: int) -> int:
        return int(self._table[index, 64])

    def load(self, index: int) -> Image.Image:
        values = self._table[index, :64].reshape(8, 8)
        return Image.fromarray(np.rint(values * 255 / 16).astype(np.uint8))

    def fingerprint(self) -> str:
        return hashlib.sha256(self._file).hexdigest()

    @cached_property
    def _file(self) -> bytes:
        # Only the package's folder is looked up: importing scikit-learn takes a second.
        package = importlib.util.find_spec("sklearn")
        folders = package.submodule_search_locations if package else None
        if not folders:
            raise UserError("data.source: `digits` comes with scikit-learn, which is not installed")
        return (Path(folders[0]) / "datasets" / "data" / "digits.csv.gz").read_bytes()

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        """[1797, 65]: 64 pixels and the label."""
        with gzip.open(io.BytesIO(self._file), "rt") as lines:
            return np.loadtxt(lines, delimiter=",").astype(np.int64)


@dataclass(frozen=True)
class Folder:
    """Images below a folder, sorted by relative path. Its subfolders are the classes, labelled in sorted order;
    an image beside them has no label."""

    name: str
    files: tuple[str, ...]
    """Paths relative to the folder, with forward slashes."""

    kind = "folder"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({file.split("/", 1)[0] for file in self.files if "/" in file}))

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.files)

    def title(self, index: int) -> str:
        return self.files[index]

    def label(self, index: int) -> int:
        folder, slash, _ = self.files[index].partition("/")
        return self._labels[folder] if slash else NO_LABEL

    def load(self, index: int) -> Image.Image:
        return load_image(Path(self.name) / self.files[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            try:
                status = os.stat(os.path.join(self.name, file))
            except OSError as error:
                raise _unreadable(Path(self.name) / file, error) from None
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def load_image(path: Path) -> Image.Image:
    """Decode an image file to mode L or RGB, upright. UserError names a file that cannot be decoded.

    Transparency is laid over white; 16-bit grey keeps its upper byte; of an animation the first frame is taken.
    """
    try:
        with Image.open(path, formats=sorted(set(_FORMATS.values()))) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width} x {image.height} is more than {MAX_PIXELS} pixels; shrink or remove it"
                )
            image.load()
            return _flatten(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged input
        raise _unreadable(path, error) from None


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def _image_files(root: Path) -> tuple[str, ...]:
    def refuse(error: OSError) -> None:
        raise UserError(f"data.source: {error.filename} cannot be read ({error.strerror}); change its permissions")

    files, passed_over = [], 0
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder).resolve()
        # A link to where it lies, or to above, would never end.
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not here.is_relative_to((Path(folder) / name).resolve())
        ]
        below = Path(folder).relative_to(root)
        files += [
            (below / name).as_posix()
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in _FORMATS
        ]
        passed_over += sum(not name.startswith(".") for name in names)
    passed_over -= len(files)
    if not files:
        raise UserError(f"data.source: no image in {root}; files ending in {', '.join(_FORMATS)} are looked for")
    for file in files:
        try:
            file.encode()
        except UnicodeEncodeError:
            raise UserError(f"data.source: the name {root}/{file!a} is not valid UTF-8; rename it") from None
    if passed_over:
        warnings.warn(
            f"data.source: {passed_over:,} files in {root} are passed over, whose names do not end in "
            f"{', '.join(_FORMATS)}",
            stacklevel=3,
        )
    return tuple(sorted(files))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return UserError(f"{path}: cannot be read as an image ({reason}); repair or remove it")
