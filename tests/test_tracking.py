"""MLflow down slows nothing and loses nothing; what is sent twice is there once."""

import warnings
from pathlib import Path

import pytest

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.tracking import Address, Tracker
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec

SPEC: Spec = tiny_spec(train__log_every=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Dataset]:
    store, data = Place.of(tmp_path_factory.mktemp("store")), SPEC.data
    recipe = {name: getattr(data, name) for name in ("image_size", "channels", "held_out", "shard_images")}
    dataset = ingest(data.source, store / "data", **recipe)
    run = Run.of(SPEC, dataset.digest, store)
    run.describe(SPEC, dataset.digest)
    train(SPEC, dataset, run)
    return run, dataset


def tracker(folder: Path, uri: str | None = None) -> Tracker:
    store = Place.of(folder)
    return Tracker(Address.of(uri, store), "ddpm", store)


def test_what_was_sent_twice_is_there_once_and_the_last_interval_is_not_lost(
    trained: tuple[Run, Dataset], tmp_path: Path
) -> None:
    run, dataset = trained
    (run.place / "tracking.json").path.unlink(missing_ok=True)
    mlflow = tracker(tmp_path)
    mlflow.start(run, SPEC, dataset)
    run_id = mlflow.run_id(run, SPEC, dataset)
    mlflow.ship(run, SPEC, dataset)
    before = (run.place / "tracking.json").read()
    mlflow.ship(run, SPEC, dataset, "FINISHED")
    (run.place / "tracking.json").write(before)  # killed between sending and remembering
    mlflow.ship(run, SPEC, dataset, "FINISHED")
    history = mlflow.client().get_metric_history(run_id, "loss")
    assert [m.step for m in history] == [3, 6, 9, 12, 15, 18, 20]
    rows = {row.step: row.exact["loss"] for row in run.journal.read(20)}
    assert history[-1].value == pytest.approx((rows[19] + rows[20]) / 2, rel=1e-12)


def test_a_tracker_that_is_down_is_said_once_and_gets_everything_later(
    trained: tuple[Run, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dataset = trained
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = tracker(tmp_path, "http://127.0.0.1:9")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        down.start(run, SPEC, dataset)
        down.ship(run, SPEC, dataset)
        down.start(run, SPEC, dataset)
    assert ["MLflow does not answer" in str(w.message) for w in said if w.category is UserWarning] == [True]
    up = tracker(tmp_path)
    up.ship(run, SPEC, dataset, "FINISHED")
    run_id = up.run_id(run, SPEC, dataset)
    assert len(up.client().get_metric_history(run_id, "gradient_norm")) == 7
    assert up.run_id(run, SPEC, dataset) == run_id
