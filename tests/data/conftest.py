"""Folders of made-up pictures, and the digits ingested once."""

from pathlib import Path

import pytest

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.store import Place
from tests.data.data_helpers import Ingest, draw_pictures


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The bundled digits in shards of 300. Tests must not change it."""
    place = Place.of(tmp_path_factory.mktemp("digits") / "dataset")
    return ingest("digits", place, image_size=8, channels=1, held_out=0.2, shard_images=300)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """40 RGB pictures of 12 x 12 pixels in the class folders `cat` and `dog`."""
    root = tmp_path / "pictures"
    draw_pictures(root, range(40))
    return root


@pytest.fixture
def make(tmp_path: Path) -> Ingest:
    """Ingest into a folder of the test, with a small recipe."""

    def make(source: object, name: str = "dataset", **changes: object) -> Dataset:
        recipe: dict = {"image_size": 12, "channels": 3, "held_out": 0.3, "shard_images": 8, **changes}
        return ingest(str(source), Place.of(tmp_path / name), **recipe)

    return make
