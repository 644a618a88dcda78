"""A real MLflow server that is slow, loses its answers or is not there: nothing waits, nothing is lost or doubled."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.progress import Progress
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.tracking import Address, Tracker, set_mlflow_up
from pipelines.tracking.reconcile import reconcile
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec
from tests.mlflow_server import Proxy, Server, history, mlflow_server, proxy_to, wait_until

SPEC: Spec = tiny_spec(train__log_every=3)
ENDS = [3, 6, 9, 12, 15, 18, 20]
"""Steps at which an interval of the journal ends, and the run."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    set_mlflow_up()
    with proxy_to(server) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    recipe = {name: getattr(SPEC.data, name) for name in ("image_size", "channels", "held_out", "shard_images")}
    return ingest(SPEC.data.source, Place.of(tmp_path_factory.mktemp("data")) / "digits", **recipe)


def begun(dataset: Dataset, folder: Path) -> Run:
    run = Run.of(SPEC, dataset.digest, Place.of(folder))
    run.describe(SPEC, dataset.digest)
    return run


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = begun(dataset, tmp_path_factory.mktemp("finished"))
    train(SPEC, dataset, run)
    return run


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """One that no tracker knows."""
    place = Place.of(tmp_path) / "runs" / finished.name
    shutil.copytree(finished.place.path, place.path)
    return Run(place)


def tracker(folder: Path, uri: str) -> Tracker:
    """With an experiment of the test's own."""
    store = Place.of(folder)
    return Tracker(Address.of(uri, store), folder.name, store)


def runs_there(server: Server, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def steps_of(server: Server, run_id: str, name: str = "loss") -> list[int]:
    from mlflow import MlflowClient

    return [step for step, _ in history(MlflowClient(server.uri), run_id, name)]


def test_a_run_that_was_made_several_times_over_because_answers_were_lost_is_there_once(
    run: Run, dataset: Dataset, server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    mlflow = tracker(tmp_path, proxy.uri)
    proxy.lost = {"runs/create": [True] * 3}  # MLflow's client tries three times, and gives up
    with pytest.warns(UserWarning, match="MLflow does not answer"):
        mlflow.start(run, SPEC, dataset)
    assert len(runs_there(server, tmp_path.name)) == 3
    mlflow.start(run, SPEC, dataset)
    (left,) = runs_there(server, tmp_path.name)
    proxy.lost = {"runs/create": [True]}  # and here it is answered the second time
    other = mlflow.parent_run("other", {})
    assert {found.info.run_id for found in runs_there(server, tmp_path.name)} == {left.info.run_id, other}


def test_rows_that_arrived_unheard_are_not_sent_again_though_they_were_made_again(
    run: Run, dataset: Dataset, server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    mlflow = tracker(tmp_path, proxy.uri)
    run_id = mlflow.run_id(run, SPEC, dataset)
    proxy.lost = {"runs/log-batch": [False, True, True, True]}  # the tags' is heard, the rows' never
    with pytest.warns(UserWarning, match="metrics kept back"):
        mlflow.ship(run, SPEC, dataset, "FINISHED")
    rows = [replace(row, time_ms=row.time_ms + 60_000, wall={"images_per_second": 1.0}) for row in run.journal.read(20)]
    run.journal.commit(2, rows)  # the later attempt's, at another time
    mlflow.ship(run, SPEC, dataset, "FINISHED")
    assert steps_of(server, run_id) == ENDS
    assert steps_of(server, run_id, "images_per_second") == ENDS


def test_a_slow_tracker_delays_neither_steps_nor_ctrl_c_and_has_all_of_it_later(
    dataset: Dataset, server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    run, mlflow = begun(dataset, tmp_path), tracker(tmp_path, proxy.uri)
    proxy.delay, began, said = 5.0, time.monotonic(), Said()
    with contextlib.suppress(KeyboardInterrupt), mlflow.shipping(run, SPEC, dataset, said):
        train(SPEC, dataset, run)
        trained = time.monotonic() - began
        raise KeyboardInterrupt
    assert time.monotonic() - began < trained + 5, "the block waits at its end for a few seconds at most"
    assert f"ddpm reconcile {run.name}" in said.lines[-1]
    assert trained < 30, "20 tiny steps, in which a tracker so slow was not even told of the run"
    proxy.delay = 0.0
    mlflow.ship(run, SPEC, dataset, "FINISHED")  # while the thread may still be sending
    (there,) = runs_there(server, tmp_path.name)
    assert steps_of(server, there.info.run_id) == ENDS
    assert there.data.params["train.global_batch"] == "32"


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_reconcile_sends_what_is_owed_once_and_says_when_the_tracker_does_not_answer(
    run: Run, dataset: Dataset, server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    store = Place.of(tmp_path)
    proxy.refuse = True
    with (
        pytest.warns(UserWarning, match="run not created yet"),
        tracker(tmp_path, proxy.uri).shipping(run, SPEC, dataset, Progress()),
    ):
        pass  # down for the whole run
    command = [sys.executable, "-m", "jobs", "reconcile", "--json", "--storage", str(tmp_path)]
    ended = subprocess.run([*command, "--tracking-uri", proxy.uri], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    (told,) = json.loads(ended.stdout.splitlines()[-1])["runs"]
    assert (told["run"], told["steps"]) == (run.name, 0)
    assert told["error"]
    assert ended.stderr.splitlines()[-1].startswith("ddpm: failed: 1 run could not be sent")

    proxy.refuse = False
    (first,) = reconcile(store, run.name, proxy.uri, Progress())
    (again,) = reconcile(store, None, proxy.uri, Progress())
    assert (first.steps, first.error, again.steps, again.error) == (20, None, 0, None)
    (there,) = runs_there(server, "ddpm")
    assert there.info.status == "FINISHED"
    assert steps_of(server, there.info.run_id) == ENDS
    (lineage,) = there.inputs.dataset_inputs
    assert dataset.digest.startswith(lineage.dataset.digest)


def test_a_run_that_goes_on_while_the_tracker_is_down_is_running_there_when_it_answers(
    run: Run, dataset: Dataset, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow = tracker(tmp_path, proxy.uri)
    mlflow.ship(run, SPEC, dataset, "KILLED")
    run_id = mlflow.run_id(run, SPEC, dataset)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        proxy.refuse = True
        with mlflow.shipping(run, SPEC, dataset, Progress()):
            wait_until(lambda: any("run not created yet" in str(one.message) for one in said), 60)
            proxy.refuse = False
            wait_until(lambda: mlflow.client().get_run(run_id).info.status == "RUNNING", 60)
    assert mlflow.client().get_run(run_id).info.status == "FINISHED"
