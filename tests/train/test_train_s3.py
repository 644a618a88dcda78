"""A run in a store on S3 is the run that it would be in a folder, bit for bit; and what it does while S3 is away."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.files import StorageError
from pipelines.s3 import S3Place
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.certificate import compare
from pipelines.train.loop import Trainer, World, train
from pipelines.train.run import Run
from tests.conftest import tiny_spec, write_spec
from tests.s3_faults import BUCKET, HASTE, FaultyProxy, wait_until
from tests.train.train_helpers import trained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=100)


@pytest.fixture
def store(proxy: FaultyProxy, request: pytest.FixtureRequest) -> S3Place:
    """A store of the test's own, used in haste."""
    return S3Place(BUCKET, request.node.name, HASTE)


def run_in(store: Place, spec: Spec, dataset: Dataset) -> Run:
    run = Run.of(spec, dataset.digest, store)
    run.describe(spec, dataset.digest)
    return run


PROFILES = {"train__ema_profiles": [0.05, 0.1], "train__ema_snapshot_every": 64, "train__log_every": 1}


def test_a_run_that_was_broken_off_goes_on_to_the_bits_of_one_in_a_folder(
    dataset: Dataset, store: S3Place, tmp_path: Path
) -> None:
    spec = tiny_spec(**PROFILES)
    local = trained(spec, dataset, tmp_path)
    run = run_in(store, spec, dataset)
    assert run.name == local.name

    def stop(trainer: Trainer) -> None:
        if trainer.step == 10:
            raise KeyboardInterrupt

    with run.driving(), pytest.raises(KeyboardInterrupt):
        train(spec, dataset, run, at_checkpoint=stop)
    for name in ("model.safetensors", "ema.safetensors"):  # what a kill within the next checkpoint leaves
        (run.checkpoints.at(15) / name).write(b"half")
    with run.driving():
        assert run.checkpoints.steps() == [5, 10]
        assert not (run.checkpoints.at(15) / "model.safetensors").exists()
        outcome = train(spec, dataset, run)
    assert (outcome.step, outcome.attempt) == (20, 2)
    assert compare(run, local, 20) == []
    assert run.checkpoints.steps() == local.checkpoints.steps()
    assert run.checkpoints.kept_snapshots() == local.checkpoints.kept_snapshots() == [*range(2, 21, 2)]


def test_a_storage_that_is_away_stops_no_step_and_loses_nothing(
    dataset: Dataset, store: S3Place, proxy: FaultyProxy, tmp_path: Path
) -> None:
    spec = tiny_spec(**PROFILES, train__keep_checkpoints=30)
    local, run = trained(spec, dataset, tmp_path), run_in(store, spec, dataset)
    trainer = Trainer(spec, dataset, run, World())
    with trainer.stream() as stream:
        for step in range(1, spec.train.total_steps + 1):
            trainer.take_step(stream)
            # Away; or it takes no more; or only now and then.
            proxy.always = {4: "refuse", 5: "503", 6: "500"}.get(step)
            proxy.methods = frozenset({"PUT"} if step == 6 else {"PUT", "GET", "HEAD", "POST", "DELETE"})
            proxy.faults = [None, None, None, "500", "500", "500"] if step == 9 else []
            if step % 2 == 0:
                trainer.save_snapshot()
            trainer.save()
            trainer.recorder.settle()
            proxy.calm()
            last = {4: 3, 5: 3, 6: 3, 9: 8}.get(step, step)
            assert run.checkpoints.steps()[-1] == last
            assert run.checkpoints.verifies(last)
        trainer.recorder.finish()
    assert compare(run, local, spec.train.total_steps) == []
    for step in local.checkpoints.kept_snapshots():
        ours, theirs = ((one.checkpoints.snapshots / f"{step:09d}").read_folder() for one in (run, local))
        assert ours == theirs


def test_no_step_waits_for_a_storage_that_is_in_trouble(
    dataset: Dataset, store: S3Place, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """Else a silent one would hold the training up at every checkpoint."""
    spec = tiny_spec(train__log_every=1)
    local, run = trained(spec, dataset, tmp_path), run_in(store, spec, dataset)
    trainer = Trainer(spec, dataset, run, World())
    with trainer.stream() as stream:
        trainer.take_step(stream)
        proxy.always = "refuse"
        trainer.save()
        trainer.recorder.settle()
        proxy.always = "silent"
        seen = proxy.seen["GET"]
        begun = time.monotonic()
        for _ in range(9):
            trainer.take_step(stream)
            trainer.save()
        assert time.monotonic() - begun < 9 * HASTE.request_seconds  # of nine that wait, each has three attempts
        wait_until(lambda: proxy.seen["GET"] > seen)
        proxy.calm()
        trainer.recorder.settle()
        assert run.checkpoints.steps() in ([10], [2, 10])  # the newest, and that which was tried meanwhile
        while trainer.step < spec.train.total_steps:
            trainer.take_step(stream)
        trainer.save()
        trainer.recorder.finish()
    assert compare(run, local, spec.train.total_steps) == []


def test_driver_and_workers_leave_each_other_notes_without_a_request(
    cluster: Cluster, store: S3Place, proxy: FaultyProxy
) -> None:
    run, ray = Run(store / "runs" / "r"), cluster.connect()
    proxy.always = "refuse"

    @ray.remote
    def work(run: Run) -> str | None:
        run.show({"images": 32})
        return run.asked()

    assert run.live() is None
    assert ray.get(work.remote(run)) is None
    run.ask("stop")
    assert ray.get(work.remote(run)) == "stop"
    assert run.live() == {"images": 32}
    run.forget_asked()
    run.forget_live()
    assert ray.get(work.remote(Run(store / "runs" / "another"))) is None
    assert run.live() is None
    assert proxy.seen == {}


def test_without_ray_nobody_asks() -> None:
    code = (
        "from pipelines.store import Place; from pipelines.train.run import Run; "
        "run = Run(Place.of('s3://bucket/r')); print(run.asked(), run.live()); run.forget_asked(); run.ask('stop')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout == "None None\n"
    assert f"{StorageError.__name__}: ray:s3://bucket/r/asked-to-stop: nobody is there to tell it to" in ended.stderr


# --- the product ---


@pytest.fixture
def command(proxy: FaultyProxy, store: S3Place, tmp_path: Path) -> list[str]:
    spec = write_spec(tmp_path / "spec.yaml", train__images=6400, train__checkpoint_every=20)
    place = f"s3://{store.bucket}/{store.key}"
    return [
        *(sys.executable, "-m", "jobs", "train", str(spec), "--json", "--storage", place),
        *("--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--set", "train.oversubscribe=true"),
    ]


@pytest.mark.cluster
def test_the_product_trains_on_s3_through_kills_and_another_number_of_workers(
    command: list[str], dataset: Dataset, store: S3Place, proxy: FaultyProxy, tmp_path: Path
) -> None:
    spec = tiny_spec(train__images=6400, train__checkpoint_every=20)
    local = trained(spec, dataset, tmp_path / "local")
    run = Run(store / "runs" / local.name)

    def kept(step: int) -> bool:
        return any(kept > step for kept in run.checkpoints.steps())

    with subprocess.Popen([*command, "--set", "train.workers=2"], stderr=subprocess.PIPE, text=True) as first:
        wait_until(lambda: kept(0), 240)
        os.kill(run.worker(1, 1)["pid"], signal.SIGKILL)  # type: ignore[index]
        wait_until(lambda: run.worker(2, 1), 240)
        wait_until(lambda: kept(max(run.checkpoints.steps())), 240)
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "keeps step" in said
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=480)
    assert second.returncode == 0, second.stderr
    told = json.loads(second.stdout.splitlines()[-1])
    assert told["attempts"] == 3
    assert told["checkpoint"] == str(run.checkpoints.at(200))
    assert told["model_sha256"] == local.checkpoints.digests(200)["model.safetensors"]
    assert compare(run, local, 200) == []
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=480)
    assert "(done before)" in again.stderr
