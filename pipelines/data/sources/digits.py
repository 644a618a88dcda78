"""The digits that come with scikit-learn."""

import gzip
import hashlib
import importlib.util
import io
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.sources.images import picture
from pipelines.errors import UserError


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

    def split(self, index: int) -> str | None:
        return None

    def load(self, index: int) -> Image.Image:
        values = self._table[index, :64].reshape(8, 8)
        return picture(np.rint(values * 255 / 16).astype(np.uint8))

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
