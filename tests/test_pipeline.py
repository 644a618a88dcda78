"""The main job on a tiny spec, through real Ray, real shards and a real MLflow."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors import SafetensorError

from pipelines.cluster import Cluster
from pipelines.data.manifest import Dataset
from pipelines.errors import Refused, UserError
from pipelines.models import Model, find_model, of_checkpoint
from pipelines.pipeline import Result, register_finished, run, run_training
from pipelines.progress import Progress
from pipelines.registry.register import list_models
from pipelines.session import Session, open_session
from pipelines.store import Place, sha256
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec, write_spec

SPEC = tiny_spec(train__workers=2, name="tiny")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline") / "store"


@pytest.fixture(scope="module")
def shared(cluster: Cluster, store: Path) -> Session:
    return open_session(cluster, Progress(), SPEC, storage=str(store))


@pytest.fixture(scope="module")
def result(shared: Session) -> Result:
    return run(SPEC, shared)


def test_every_step_was_done_and_the_champion_is_registered(result: Result, shared: Session) -> None:
    assert result.steps_done == ["ingest", "train", "evaluate", "sample", "register", "promote"]
    (model,) = list_models(shared.tracking_uri, "tiny")
    assert model["aliases"] == {"champion": result.version} == {"champion": result.champion}
    decision = json.loads(model["versions"][-1]["tags"]["decision"])
    assert decision["promoted"]
    assert {v["gate"] for v in decision["verdicts"]} == {"frechet_over_floor", "feature_accuracy"}


def test_the_second_run_does_nothing_and_starts_no_cluster(result: Result, shared: Session) -> None:
    class NoCluster(Cluster):
        def connect(self) -> None:
            raise AssertionError("a run with nothing to do must not start Ray")

    again = run(SPEC, replace(shared, cluster=NoCluster(None)))
    assert again.steps_done == []
    assert (again.version, again.samples) == (result.version, result.samples)


def test_a_run_that_cannot_begin_is_none(shared: Session) -> None:
    before = set((shared.store / "runs").list()) if (shared.store / "runs").exists() else set()
    with pytest.raises(UserError, match=r"^train\.workers: 64 workers of 1 thread need 64 CPUs"):
        run(tiny_spec(train__workers=64, train__slots=64, train__global_batch=64), shared)
    after = {name for name in (shared.store / "runs").list() if (shared.store / "runs" / name / "run.json").exists()}
    assert after <= before


def test_a_changed_field_runs_only_what_depends_on_it(result: Result, shared: Session) -> None:
    more = run(tiny_spec(train__workers=2, sample__n=40), shared)
    assert more.steps_done == ["sample"]
    stricter = tiny_spec(train__workers=2, promote__frechet_over_floor=1e-9)
    with pytest.raises(Refused, match="frechet_over_floor") as refused:
        run(stricter, shared)
    found = refused.value.result
    assert (found.scores, found.champion, found.steps_done) == (result.scores, result.version, ["sample"])
    assert not found.decision["promoted"]
    with pytest.raises(Refused):  # a refusal is not a done step
        run(stricter, shared)


def test_a_version_carries_the_spec_that_it_was_evaluated_with(result: Result, shared: Session) -> None:
    """The run's own record keeps the sampling of its first day; the registered model has that of its scores."""
    other = run(tiny_spec(train__workers=2, sample__steps=4), shared)
    assert other.run == result.run
    assert other.version > result.version
    assert find_model(f"tiny@{other.version}", shared.store, shared.tracker).spec.sample.steps == 4
    assert next(s for s in other.scores if s["name"] == "frechet")["provenance"]["steps"] == 4
    again = run(SPEC, shared)
    assert again.steps_done in ([], ["sample"])  # the pictures were drawn over
    assert (again.version, again.champion) == (result.version, other.version)


def test_a_version_deleted_from_the_registry_is_made_and_judged_anew(result: Result, shared: Session) -> None:
    champion = run(tiny_spec(train__workers=2, sample__steps=4), shared)
    shared.tracker.client().delete_model_version("tiny", str(champion.version))
    again = run(tiny_spec(train__workers=2, sample__steps=4), shared)
    assert {"register", "promote"} <= set(again.steps_done)
    assert again.champion == again.version > champion.version


def test_pictures_and_samples_are_there(result: Result) -> None:
    folder = Path(result.folder)
    for name in ("grid.png", "trajectory.png", "schedule.png", "loss.png", "pairs.png"):
        assert min(Image.open(folder / name).size) > 50
    assert result.samples["n"] == 30


def test_mlflow_has_every_step_once_with_lineage_and_pictures(result: Result, shared: Session) -> None:
    client = shared.tracker.client()
    version = client.get_model_version("tiny", str(result.version))
    mlflow_run = client.get_run(version.run_id)
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["diffusion.schedule.kind"] == "cosine"
    (lineage,) = mlflow_run.inputs.dataset_inputs
    assert mlflow_run.data.tags["ddpm.dataset_digest"].startswith(lineage.dataset.digest)
    history = client.get_metric_history(version.run_id, "loss")
    assert [m.step for m in history] == list(range(2, 21, 2))
    rows = {row.step: row.exact["loss"] for row in Run(shared.store / "runs" / result.run).journal.read(20)}
    assert history[0].value == pytest.approx((rows[1] + rows[2]) / 2, rel=1e-12)
    names = {artifact.path for artifact in client.list_artifacts(version.run_id)}
    assert {"grid.png", "trajectory.png", "schedule.png", "loss.png", "pairs.png", "scores.json"} <= names


def test_the_registered_model_is_the_checkpoint(result: Result, shared: Session) -> None:
    registered = find_model(f"tiny@{result.version}", shared.store, shared.tracker)
    training = Run(shared.store / "runs" / result.run)
    assert registered.digest == of_checkpoint(training, training.last_step()).digest
    assert registered.spec == SPEC
    assert find_model("tiny@champion", shared.store, shared.tracker).digest == registered.digest


def test_the_artifact_is_safetensors_and_json_and_a_pickle_in_its_place_is_not_opened(
    result: Result, shared: Session
) -> None:
    champion = find_model(f"tiny@{result.version}", shared.store, shared.tracker)
    stored = {path.suffix for path in shared.store.path.glob("mlflow-artifacts/models/*/artifacts/artifacts/*")}
    assert stored == {".safetensors", ".json"}
    pickled = pickle.dumps(Unpickled())
    poisoned = {**champion.config(), "model_digest": sha256(pickled)}
    with pytest.raises(SafetensorError):
        Model.from_config(poisoned, pickled, "test").build()
    assert not Unpickled.happened


class Unpickled:
    """Leaves a trace where somebody unpickles it."""

    happened: ClassVar[list[bool]] = []

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Unpickled.happened.append, (True,)


def test_the_registered_model_predicts_through_mlflow(
    result: Result, shared: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, shared.tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/tiny/{result.version}")
    images = model.predict(pandas.DataFrame({"seed": [1, 2, 3]}))
    assert images.shape == (3, 8, 8, 1)
    assert images.dtype == np.uint8
    assert not np.array_equal(images[0], images[1])


def test_images_that_are_gone_are_drawn_again(result: Result, shared: Session) -> None:
    for shard in Path(result.samples["out"]).glob("*.tar"):
        shard.unlink()
    again = run(SPEC, shared)
    assert again.steps_done == ["sample"]
    assert again.samples["sha256"] == result.samples["sha256"]


def test_a_finished_run_is_sent_to_a_tracker_that_has_not_got_it(
    result: Result, shared: Session, tmp_path: Path
) -> None:
    other = open_session(shared.cluster, Progress(), SPEC, str(shared.store), f"sqlite:///{tmp_path / 'other.db'}")
    assert run_training(SPEC, other)["run"] == result.run
    client = other.tracker.client()
    (sent,) = client.search_runs([client.get_experiment_by_name("ddpm").experiment_id])
    assert [m.step for m in client.get_metric_history(sent.info.run_id, "loss")] == list(range(2, 21, 2))
    assert sent.info.status == "FINISHED"


def test_an_unfinished_run_is_not_registered(result: Result, shared: Session) -> None:
    done = Run(shared.store / "runs" / result.run)
    further = tiny_spec(train__workers=2, train__images=1280)
    done.describe(further, done.description()["dataset_digest"])
    try:
        with pytest.raises(UserError, match="its training has not ended"):
            register_finished(done, shared)
    finally:
        done.describe(SPEC, done.description()["dataset_digest"])
    assert register_finished(done, shared)["version"] == result.version


def test_scores_carry_their_provenance(result: Result) -> None:
    scores = {score["name"]: score for score in result.scores}
    frechet = scores["frechet"]["provenance"]
    for field in ("n", "dataset_digest", "model_digest", "sampler", "steps", "floor", "features_digest"):
        assert frechet[field], field
    assert (
        scores["bits_per_dim"]["interval"][0] < scores["bits_per_dim"]["value"] < scores["bits_per_dim"]["interval"][1]
    )


def drive(spec: Path, store: Path, address: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "jobs",
        "train",
        str(spec),
        "--storage",
        str(store),
        "--set",
        f"ray.address={address}",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_checkpoint(store: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not list(store.glob("runs/*/checkpoints/0*/MANIFEST.json")):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Killer(Progress):
    """Kills one training worker as soon as training is seen to go on."""

    def __init__(self) -> None:
        self.killed: list[int] = []

    def advance(self, done: int, total: int, unit: str, rate: float | None = None, **figures: float) -> None:
        if unit == "images" and figures and not self.killed:
            self.killed.append(newest_train_worker())
            os.kill(self.killed[0], signal.SIGKILL)


def newest_train_worker() -> int:
    """Process id of a Ray Train worker below this process."""
    processes = psutil.Process().children(recursive=True)
    workers = [p for p in processes if "RayTrainWorker" in " ".join(p.cmdline())]
    return max(workers, key=psutil.Process.create_time).pid


@pytest.mark.faults
def test_a_killed_driver_and_then_a_killed_worker_change_no_bit(
    cluster: Cluster, ray_address: str, tmp_path: Path
) -> None:
    """SIGKILL in the middle of training, twice; a second driver is refused while the first lives."""
    fields = {"train__workers": 2, "train__images": 6_400, "train__checkpoint_every": 20}
    spec, store, killer = tiny_spec(**fields), tmp_path / "store", Killer()
    session = open_session(cluster, killer, spec, storage=str(store))
    process = drive(write_spec(tmp_path / "spec.yaml", **fields), store, ray_address)
    wait_for_checkpoint(store, process)
    with pytest.raises(UserError, match=f"is being driven by process {process.pid} "):
        run_training(spec, session)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = (store / "runs").iterdir()
    run = Run(session.store / "runs" / folder.name)
    assert 0 < run.last_step() < 200
    assert not killer.killed

    outputs = run_training(spec, session)
    assert killer.killed
    assert outputs["attempts"] == 3

    dataset = Dataset.open(session.store / "datasets" / (session.store / "datasets").list()[0])
    alone = Run.of(spec, dataset.digest, Place.of(tmp_path / "alone"))
    alone.describe(spec, dataset.digest)
    train(spec, dataset, alone)  # one process, no Ray
    assert alone.checkpoints.digests(200)["model.safetensors"] == outputs["model_sha256"]
    assert alone.checkpoints.digests(200)["ema.safetensors"] == outputs["ema_sha256"]
    rows = [(row.step, row.exact) for row in run.journal.read(200)]
    assert rows == [(row.step, row.exact) for row in alone.journal.read(200)]
    assert len(rows) == 200
