"""Runs are sent to their trackers by whoever has the store; no run, score or file at fault keeps another back."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

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
from tests.train import train_helpers

SPEC: Spec = tiny_spec(train__log_every=3)
LONGER: Spec = tiny_spec(train__log_every=3, train__images=1280)
ENDS = [3, 6, 9, 12, 15, 18, 20]
"""Steps at which an interval of the journal ends, and the run."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Dataset]:
    store, data = Place.of(tmp_path_factory.mktemp("store")), SPEC.data
    recipe = {name: getattr(data, name) for name in ("image_size", "channels", "held_out", "shard_images")}
    dataset = ingest(data.source, store / "data", **recipe)
    return train_helpers.trained(SPEC, dataset, store.path), dataset


@pytest.fixture
def dataset(made: tuple[Run, Dataset]) -> Dataset:
    return made[1]


@pytest.fixture
def run(made: tuple[Run, Dataset], tmp_path: Path) -> Run:
    """In a store of its own; no tracker knows it."""
    return copied(made[0], tmp_path / "store", made[0].name)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database that is in no store: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def copied(run: Run, store: Path, name: str) -> Run:
    place = Place.of(store) / "runs" / name
    shutil.copytree(run.place.path, place.path)
    return Run(place)


def tracker(run: Run, uri: str | None) -> Tracker:
    store = run.place.parent.parent
    return Tracker(Address.of(uri, store), "ddpm", store)


def losses(mlflow: Tracker, run_id: str) -> list[int]:
    return sorted(metric.step for metric in mlflow.client().get_metric_history(run_id, "loss"))


def runs_there(mlflow: Tracker, run: Run) -> list[Any]:
    client = mlflow.client()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, filter_string=f"tags.`ddpm.run` = '{run.name}'"))


def test_how_a_run_was_said_to_end_stays_and_one_that_fell_silent_was_killed(
    run: Run, dataset: Dataset, uri: str
) -> None:
    run.describe(LONGER, dataset.digest)
    mlflow, store = tracker(run, uri), run.place.parent.parent
    run_id = mlflow.run_id(run, LONGER, dataset)

    def status() -> str:
        return mlflow.client().get_run(run_id).info.status

    for told in ("FAILED", "FINISHED"):  # by an error, and by a sweep that had seen enough
        mlflow.ship(run, LONGER, dataset, told)
        (done,) = reconcile(store, run.name, uri, Progress())
        assert (done.error, status()) == (None, told)
    assert mlflow.start(run, LONGER, dataset)
    with run.driving():
        (done,) = reconcile(store, run.name, uri, Progress())
        assert (done.error, status()) == (None, "RUNNING")
    (done,) = reconcile(store, run.name, uri, Progress())
    assert (done.error, status()) == (None, "KILLED")


def test_runs_at_fault_are_named_and_the_others_get_all(run: Run, dataset: Dataset, uri: str) -> None:
    store = run.place.parent.parent
    tracker(run, uri).settle(run, LONGER, _lineage(dataset))  # all are tracked, and owe the end
    faulty = {name: copied(run, store.path, name) for name in ("a-field", "a-journal", "a-record")}
    record = json.loads((faulty["a-field"].place / "run.json").read())
    record["spec"]["train"]["imagse"] = 1
    (faulty["a-field"].place / "run.json").write_json(record)
    segment = faulty["a-journal"].place / "journal" / (faulty["a-journal"].place / "journal").list()[-1]
    segment.path.write_bytes(segment.read()[:-40])
    (faulty["a-record"].place / "tracking.json").path.write_text("{")
    done = {told.run: told for told in reconcile(store, None, None, Progress())}
    assert (done[run.name].steps, done[run.name].error) == (2, None)
    assert "imagse" in str(done["a-field"].error)
    assert done["a-journal"].error
    assert "tracking.json is damaged" in str(done["a-record"].error)
    assert {told.tracker for told in done.values() if told.run != "a-field" and told.run != "a-record"} == {uri}


def test_a_score_that_cannot_be_sent_keeps_neither_rows_nor_other_scores_back(
    run: Run, dataset: Dataset, uri: str
) -> None:
    mlflow = tracker(run, uri)
    for step in (10, 20):
        run.scores.commit(_score(step), b"a picture")
    run.scores.picture(10).delete()
    with pytest.warns(UserWarning, match="metrics kept back: the score of step 10 could not be sent") as said:
        mlflow.ship(run, SPEC, dataset, "FINISHED")
    assert not any("MLflow does not answer" in str(one.message) for one in said)
    run_id = mlflow.run_id(run, SPEC, dataset)
    assert losses(mlflow, run_id) == ENDS
    assert mlflow.client().get_run(run_id).info.status == "FINISHED"
    assert [found.path for found in mlflow.client().list_artifacts(run_id, "scores")] == ["scores/000000020.png"]
    assert mlflow.owes(run, SPEC, dataset, "FINISHED")


def test_a_damaged_record_stops_no_run_and_hides_no_interrupt(run: Run, dataset: Dataset, uri: str) -> None:
    mlflow, said = tracker(run, uri), _Said()
    (run.place / "tracking.json").write(b"{")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt), mlflow.shipping(run, SPEC, dataset, said):
            raise KeyboardInterrupt
    assert "tracking.json is damaged: delete it" in " ".join(str(one.message) for one in warned)
    assert f"`ddpm reconcile {run.name} --storage {run.place.parent.parent}`" in said.lines[-1]


def test_reconcile_sends_to_each_tracker_that_a_run_was_told_to_and_to_no_other(
    run: Run, dataset: Dataset, uri: str
) -> None:
    store = run.place.parent.parent
    tracker(run, uri).start(run, SPEC, dataset)
    (done,) = reconcile(store, run.name, None, Progress())
    assert (done.tracker, done.steps, done.error) == (uri, 20, None)
    assert not (store / "mlflow.db").exists()


def test_a_run_is_one_mlflow_run_though_its_store_or_its_tracker_moves(
    run: Run, dataset: Dataset, tmp_path: Path
) -> None:
    mlflow = tracker(run, None)
    mlflow.ship(run, SPEC, dataset)
    run_id = mlflow.run_id(run, SPEC, dataset)
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = Run(Place.of(tmp_path / "moved") / "runs" / run.name)
    mlflow = tracker(moved, None)
    assert mlflow.run_id(moved, SPEC, dataset) == run_id
    (done,) = reconcile(Place.of(tmp_path / "moved"), None, None, Progress())
    assert (done.steps, done.error) == (2, None), "the last interval, now that it is known to be that"
    shutil.copy(tmp_path / "moved" / "mlflow.db", tmp_path / "elsewhere.db")
    mlflow = tracker(moved, f"sqlite:///{tmp_path}/elsewhere.db")
    mlflow.ship(moved, SPEC, dataset, "FINISHED")
    (there,) = runs_there(mlflow, moved)
    assert (there.info.run_id, there.info.status) == (run_id, "FINISHED")
    assert losses(mlflow, run_id) == ENDS


def test_a_record_of_an_earlier_version_is_read(run: Run, dataset: Dataset, uri: str) -> None:
    mlflow = tracker(run, uri)
    mlflow.ship(run, SPEC, dataset, "FINISHED")
    run_id = mlflow.run_id(run, SPEC, dataset)
    now = (run.place / "tracking.json").read_json()
    then = {"format": 1, "lineage": now["lineage"], "trackers": {uri: now["trackers"][uri]}}
    (run.place / "tracking.json").write_json(then)
    assert not mlflow.owes(run, SPEC, dataset, "FINISHED")
    assert mlflow.run_id(run, SPEC, dataset) == run_id


def test_a_finished_run_does_not_end_the_longer_one_that_another_process_drives(
    run: Run, dataset: Dataset, uri: str
) -> None:
    shorter = tiny_spec(train__log_every=3, train__images=320)
    mlflow = tracker(run, uri)
    assert mlflow.start(run, LONGER, dataset)
    run_id = mlflow.run_id(run, LONGER, dataset)
    with run.driving(), mlflow.shipping(run, shorter, dataset, Progress(), driven=False):
        pass
    assert losses(mlflow, run_id) == [3, 6, 9], "no further than its own end"
    assert mlflow.client().get_run(run_id).info.status == "RUNNING"
    with mlflow.shipping(run, shorter, dataset, Progress(), driven=False):
        pass
    assert mlflow.client().get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://u:p@host:5000/path", "http://host:5000/path"),
        ("https://u:se@cret@host/?token=secret", "https://host/"),
        ("http://host/a@b", "http://host/a@b"),
        ("postgresql+psycopg2://u:se@cret/secret@host:1/db?password=secret", "postgresql+psycopg2://host:1/db"),
        ("mysql://u:se?cret@host/db", "mysql://host/db"),
        ("sqlite:////home/me@home/mlflow.db", "sqlite:////home/me@home/mlflow.db"),
    ],
)
def test_an_address_is_shown_and_remembered_without_its_password(uri: str, shown: str, tmp_path: Path) -> None:
    address = Address.of(uri, Place.of(tmp_path))
    assert (address.shown, address.name, address.uri) == (shown, shown, uri)


class _Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def _lineage(dataset: Dataset) -> Any:
    from pipelines.tracking.record import Lineage

    return Lineage.of(dataset)


def _score(step: int) -> HeldOutScore:
    return HeldOutScore(
        step=step,
        images=32 * step,
        bits_per_dim=3.5,
        low=3.25,
        high=3.75,
        error=(0.5,),
        log_snr=(9.0, 0.0),
        scored=64,
        seconds=1.0,
        time_ms=1_700_000_000_000 + step,
        asked=(64, 8),
    )
