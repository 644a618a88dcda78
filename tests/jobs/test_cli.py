"""The `ddpm` command as a person meets it: one line and exit 2 for each mistake, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from pipelines.store import Place
from tests.conftest import write_spec


def ddpm(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("DDPM_", "MLFLOW_"))}
    command = [sys.executable, "-m", "jobs", *words]
    return subprocess.run(
        command, cwd=cwd, env={**surroundings, **environment}, capture_output=True, text=True, timeout=120
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("ddpm: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for shade in range(4):
            Image.new("L", (8, 8), 40 * shade + 5 * (name == "b")).save(folder / name / f"{shade}.png")
    return folder


def test_unknown_field_suggests_the_nearest(tmp_path: Path) -> None:
    write_spec(tmp_path / "spec.yaml")
    assert_refused(ddpm("run", "spec.yaml", "--set", "train.imagse=3", cwd=tmp_path), "train.imagse", "train.images")
    assert os.listdir(tmp_path) == ["spec.yaml"]


def test_wrong_type_and_missing_spec_and_missing_argument(tmp_path: Path) -> None:
    write_spec(tmp_path / "spec.yaml")
    assert_refused(ddpm("run", "spec.yaml", "--set", "train.images=many", cwd=tmp_path), "train.images")
    assert_refused(ddpm("train", "absent.yaml", cwd=tmp_path), "absent.yaml", "no such spec file")
    assert_refused(ddpm("train", cwd=tmp_path), "SPEC")
    assert_refused(ddpm("train", "spec.yaml", "--sotrage", "x", cwd=tmp_path), "--sotrage")


def test_missing_source_unreadable_image_and_zero_images(tmp_path: Path, pictures: Path) -> None:
    write_spec(tmp_path / "spec.yaml", data__source=str(tmp_path / "nowhere"))
    assert_refused(ddpm("run", "spec.yaml", cwd=tmp_path), "nowhere")
    (tmp_path / "empty").mkdir()
    assert_refused(ddpm("run", "spec.yaml", "--set", f"data.source={tmp_path / 'empty'}", cwd=tmp_path), "empty")
    (pictures / "b" / "torn.png").write_bytes((pictures / "b" / "1.png").read_bytes()[:40])
    assert_refused(ddpm("run", "spec.yaml", "--set", f"data.source={pictures}", cwd=tmp_path), "torn.png")
    store = Place.of(tmp_path / "ddpm-store")
    assert [entry for place in ("datasets", "steps", "runs") for entry in (store / place).list()] == []


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    write_spec(tmp_path / "spec.yaml")
    (tmp_path / "file").write_text("")
    assert_refused(ddpm("run", "spec.yaml", "--storage", "file/store", cwd=tmp_path), "file/store", "storage")


def test_verbs_that_only_read_make_nothing(tmp_path: Path) -> None:
    assert_refused(ddpm("models", cwd=tmp_path), "no tracking database")
    assert_refused(ddpm("sample", "tiny@champion", "--out", "out", cwd=tmp_path), "no tracking database")
    assert_refused(ddpm("sample", "tiny-123", "--out", "out", cwd=tmp_path), "tiny-123")
    assert os.listdir(tmp_path) == []


def test_trackers_outputs_and_ports_that_cannot_be(tmp_path: Path) -> None:
    write_spec(tmp_path / "spec.yaml")
    (tmp_path / "file").write_text("")
    assert_refused(ddpm("train", "spec.yaml", "--tracking-uri", "foo://x", cwd=tmp_path), "tracking.uri", "foo://x")
    assert_refused(ddpm("ui", "--port", "99999999", cwd=tmp_path), "port")
    assert_refused(ddpm("promote", "tiny@1", "--storage", "s", cwd=tmp_path), "no tracking database")
    done = ddpm("models", "--tracking-uri", "http://127.0.0.1:9", cwd=tmp_path, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ddpm: failed: MLflow: ")


def test_a_field_that_has_an_option_of_its_own_is_not_silently_without_effect(tmp_path: Path) -> None:
    done = ddpm("sample", "tiny-1", "--out", "out", "--set", "sample.n=5", cwd=tmp_path)
    assert_refused(done, "sample.n=5", "--n")


def test_a_section_of_a_model_suggests_the_nearest(tmp_path: Path) -> None:
    done = ddpm("sample", "tiny-1", "--out", "out", "--set", "smaple.steps=5", cwd=tmp_path)
    assert_refused(done, "smaple.steps=5: did you mean sample?")


def test_addresses_and_names_that_cannot_be(tmp_path: Path) -> None:
    write_spec(tmp_path / "spec.yaml")
    for address in ("foo", "127.0.0.1:9"):
        done = ddpm("train", "spec.yaml", "--set", f"ray.address={address}", cwd=tmp_path)
        assert_refused(done, "ray.address", address)


def test_more_than_the_cluster_has_is_refused_before_anything_starts(tmp_path: Path, ray_address: str) -> None:
    write_spec(tmp_path / "spec.yaml", train__workers=16, train__slots=16, train__global_batch=64)
    done = ddpm("train", "spec.yaml", "--set", f"ray.address={ray_address}", cwd=tmp_path)
    assert_refused(done, "train.workers", "train.oversubscribe")
    write_spec(tmp_path / "spec.yaml")
    rare = ("--set", "train.resources={licence: 1}", "--set", f"ray.address={ray_address}")
    done = ddpm("train", "spec.yaml", *rare, cwd=tmp_path)
    assert_refused(done, "train.resources: 1 worker need 1 licence, the cluster has 0")


def test_ingest_prints_one_json_object_last(tmp_path: Path, pictures: Path) -> None:
    options = ("--image-size", "8", "--held-out", "0.5", "--json")
    done = ddpm("ingest", str(pictures), "data", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["classes"] == ["a", "b"]
    assert sum(split["samples"] for split in result["splits"].values()) == 8


@pytest.mark.parametrize(("number", "own_ray"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_an_interrupted_run_says_so_and_leaves_no_process(
    tmp_path: Path, ray_address: str, number: signal.Signals, own_ray: bool
) -> None:
    write_spec(tmp_path / "spec.yaml", train__images=10_000_000)
    command = [sys.executable, "-m", "jobs", "train", "spec.yaml"]
    command += [] if own_ray else ["--set", f"ray.address={ray_address}"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("ddpm-store/runs/*/checkpoints/0*/MANIFEST.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "ddpm: interrupted"
    last = max(int(step.name) for step in tmp_path.glob("ddpm-store/runs/*/checkpoints/0*"))
    assert "stopping after this step, with a checkpoint" in said
    assert f"keeps step {last:,}, the same command goes on from there" in said
    assert "Traceback" not in said
    assert not list(Path("/tmp").glob(f"ddpm-{process.pid}-*"))
    assert not processes_naming(f"ddpm-{process.pid}-")


def processes_naming(text: str) -> list[list[str]]:
    """Command lines that hold a text (Ray's processes name their folder), given a moment to end."""
    deadline = time.monotonic() + 20
    while True:
        lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
        alive = [line for line in lines if any(text in word for word in line)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)
