"""Which images a score is taken from, and which models can be scored against them."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.errors import UserError
from pipelines.evaluate.chance import choose_images
from pipelines.evaluate.job import evaluate
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.session import open_session
from pipelines.store import Place
from tests.conftest import tiny_fields, tiny_spec


def test_images_of_a_dataset_sorted_by_class_are_drawn_from_all_of_them() -> None:
    classes = np.repeat(np.arange(4), 50)
    chosen = choose_images(200, 40, seed=0)
    assert np.bincount(classes[chosen]).min() >= 4
    assert len(set(chosen.tolist())) == 40
    assert np.array_equal(chosen, choose_images(200, 40, seed=0))
    assert not np.array_equal(chosen, choose_images(200, 40, seed=1))
    assert np.array_equal(choose_images(200, 999, seed=0), np.arange(200))


class NoCluster(Cluster):
    def connect(self) -> None:
        raise AssertionError("nothing may start")


def test_a_model_of_other_classes_is_refused_before_anything_starts(tmp_path: Path) -> None:
    dataset = ingest("digits", Place.of(tmp_path / "data"), image_size=8, channels=1, held_out=0.4, shard_images=1000)
    spec = tiny_spec(model={**tiny_fields()["model"], "classes": 9})
    model = Model(spec, b"weights that nobody reads", "no-data", "test", "none")
    session = open_session(NoCluster(None), Progress(), spec, str(tmp_path / "store"))
    with pytest.raises(UserError, match="images of 10 classes, the model knows 9"):
        evaluate(model, dataset, spec, session)
