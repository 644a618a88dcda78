"""Made-up pictures for the tests of data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.manifest import Dataset

Ingest = Callable[..., Dataset]


def draw_pictures(root: Path, numbers: range) -> None:
    for number in numbers:
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise_picture(number)).save(folder / f"{number:03d}.png")


def noise_picture(number: int, height: int = 12, width: int = 12) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
