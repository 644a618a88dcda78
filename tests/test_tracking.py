"""MLflow down slows nothing and loses nothing; what is sent twice is there once."""

import contextlib
import io
import warnings
from pathlib import Path
from socket import gethostname

import pytest
from PIL import Image

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.progress import Progress
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.tracking import Address, Tracker
from pipelines.tracking.reconcile import reconcile
from pipelines.train.run import Run
from pipelines.train.scores import HeldOutScore
from tests.conftest import tiny_spec
from tests.mlflow_server import wait_until
from tests.train import train_helpers

SPEC: Spec = tiny_spec(train__log_every=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Dataset]:
    store, data = Place.of(tmp_path_factory.mktemp("store")), SPEC.data
    recipe = {name: getattr(data, name) for name in ("image_size", "channels", "held_out", "shard_images")}
    dataset = ingest(data.source, store / "data", **recipe)
    return train_helpers.trained(SPEC, dataset, store.path), dataset


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


def test_attempts_host_memory_and_half_life_are_told(trained: tuple[Run, Dataset], tmp_path: Path) -> None:
    run, dataset = trained
    mlflow = tracker(tmp_path)
    mlflow.ship(run, SPEC, dataset)
    run_id = mlflow.run_id(run, SPEC, dataset)
    first = mlflow.client().get_run(run_id).data
    told = [first.tags[f"ddpm.{name}"] for name in ("attempt", "workers", "host")]
    assert told == ["1", "1", gethostname()]
    assert first.params["train.learning_rate"] == "0.002"
    assert first.metrics["memory_peak_bytes"] >= first.metrics["memory_bytes"] > 10e6
    assert 0 <= first.metrics["system/cpu_utilization_percentage"] <= 100
    half_life = {m.step: m.value for m in mlflow.client().get_metric_history(run_id, "ema_half_life_images")}
    assert half_life[18] == pytest.approx(0.05 * 32 * 17), "while it rises: the mean of steps 16 to 18"

    run.note_worker(2, 0, workers=2, step=20)
    run.note_worker(2, 1, workers=2, step=20)
    mlflow.ship(run, SPEC, dataset)
    tags = mlflow.client().get_run(run_id).data.tags
    assert (tags["ddpm.attempt"], tags["ddpm.workers"]) == ("2", "2")
    host = gethostname()
    assert tags["ddpm.attempts"] == f"1: 1 worker on {host}, from step 0\n2: 2 workers on {host}, from step 20"


def test_how_the_training_ended_is_how_its_mlflow_run_ended(trained: tuple[Run, Dataset], tmp_path: Path) -> None:
    run, dataset = trained
    mlflow = tracker(tmp_path)

    def status() -> str:
        return mlflow.client().get_run(mlflow.run_id(run, SPEC, dataset)).info.status

    for error, ended in ((KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")):
        with contextlib.suppress(error), mlflow.shipping(run, SPEC, dataset, Progress()):
            wait_until(lambda: status() == "RUNNING", 60)
            raise error
        wait_until(lambda ended=ended: status() == ended, 60)
    with mlflow.shipping(run, SPEC, dataset, Progress()):
        wait_until(lambda: status() == "RUNNING", 60)
    assert status() == "FINISHED"


def test_a_second_mlflow_run_by_a_request_that_came_late_is_deleted_by_reconcile(
    trained: tuple[Run, Dataset], tmp_path: Path
) -> None:
    run, dataset = trained
    mlflow, store = tracker(tmp_path), Place.of(run.place.path.parents[1])
    mlflow.ship(run, SPEC, dataset, "FINISHED")
    client, run_id = mlflow.client(), mlflow.run_id(run, SPEC, dataset)
    there = client.get_run(run_id)
    late = client.create_run(there.info.experiment_id, tags=there.data.tags)
    other = client.create_run(there.info.experiment_id, tags={"ddpm.run": run.name})  # of another store's run
    (done,) = reconcile(store, run.name, mlflow.address.uri, Progress())
    assert (done.steps, done.error) == (0, None)
    left = {found.info.run_id for found in client.search_runs([there.info.experiment_id])}
    assert (late.info.run_id in left, left) == (False, {run_id, other.info.run_id})


def test_an_mlflow_run_that_was_deleted_is_made_anew_with_all_of_its_rows(
    trained: tuple[Run, Dataset], tmp_path: Path
) -> None:
    run, dataset = trained
    mlflow = tracker(tmp_path)
    mlflow.ship(run, SPEC, dataset, "FINISHED")
    before = mlflow.run_id(run, SPEC, dataset)
    mlflow.client().delete_run(before)
    (done,) = reconcile(Place.of(run.place.path.parents[1]), run.name, mlflow.address.uri, Progress())
    after = mlflow.run_id(run, SPEC, dataset)
    assert (done.steps, after != before) == (20, True)
    assert [m.step for m in mlflow.client().get_metric_history(after, "loss")] == [3, 6, 9, 12, 15, 18, 20]


def test_scores_on_held_out_images_are_sent_once_and_only_where_a_checkpoint_is(
    trained: tuple[Run, Dataset], tmp_path: Path
) -> None:
    run, dataset = trained
    mlflow, picture = tracker(tmp_path), io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    for step in (10, 20, 25):  # no checkpoint at 25 yet
        run.scores.commit(score(step, 3.5), picture.getvalue())
    try:
        mlflow.ship(run, SPEC, dataset)
        run.scores.commit(score(10, 9.0), picture.getvalue())  # taken again by a later attempt
        mlflow.ship(run, SPEC, dataset, "FINISHED")
    finally:
        run.scores.place.remove()
    client, run_id = mlflow.client(), mlflow.run_id(run, SPEC, dataset)
    for name, value in {"bits_per_dim": 3.5, "bits_per_dim_low": 3.25, "error_log_snr_bin_1": 0.5}.items():
        there = client.get_metric_history(run_id, f"held_out/{name}")
        assert [(m.step, m.value) for m in there] == [(10, value), (20, value)], name
    assert "held_out/error_log_snr_bin_2" not in client.get_run(run_id).data.metrics, "which is not finite"
    names = [artifact.path for artifact in client.list_artifacts(run_id, "scores")]
    assert names == ["scores/000000010.png", "scores/000000020.png"]
    assert Path(client.download_artifacts(run_id, names[0])).read_bytes() == picture.getvalue()


def score(step: int, bits: float) -> HeldOutScore:
    return HeldOutScore(
        step=step,
        images=32 * step,
        bits_per_dim=bits,
        low=bits - 0.25,
        high=bits + 0.25,
        error=(0.5, None),
        log_snr=(9.0, 0.0, None),
        scored=64,
        asked=(64, 8),
        seconds=1.0,
        time_ms=1_700_000_000_000 + step,
    )


def test_what_a_score_still_to_come_may_discard_waits(trained: tuple[Run, Dataset], tmp_path: Path) -> None:
    run, dataset = trained
    mlflow = tracker(tmp_path)
    spec = tiny_spec(train__log_every=3, train__score={"every_images": 320}, train__plateau={"patience_images": 320})
    mlflow.ship(run, spec, dataset)
    run_id = mlflow.run_id(run, spec, dataset)

    def steps() -> list[int]:
        return sorted(m.step for m in mlflow.client().get_metric_history(run_id, "loss"))

    assert steps() == [3, 6, 9], "the score of step 10 may end the run there"
    try:
        run.scores.commit(score(10, 3.5), b"a picture")
        mlflow.ship(run, spec, dataset)
        assert steps() == [3, 6, 9, 12, 15, 18]
    finally:
        run.scores.place.remove()
