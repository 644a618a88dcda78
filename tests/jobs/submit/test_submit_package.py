"""What is refused before anything is sent, and what is sent: a spec that means the same on every host."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.submit.host import SETUP
from jobs.submit.package import PACKAGES, entrypoint, fill_working_dir, portable
from pipelines.errors import UserError
from pipelines.spec import load_spec
from tests.conftest import tiny_spec


@pytest.mark.parametrize("storage", [None, "store", "./store", "~/store", "file://store"])
def test_a_store_that_hosts_would_read_differently_is_refused(storage: str | None) -> None:
    with pytest.raises(UserError, match=r"^storage: .* --storage /an/absolute/path/that/every/host/sees$"):
        portable(tiny_spec(), storage, None)


def test_the_store_is_the_option_s_else_the_spec_s_else_the_client_s_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DDPM_STORAGE", "/of/environment")
    assert portable(tiny_spec(), None, None).storage == "/of/environment"
    assert portable(tiny_spec(storage="/of/spec"), None, None).storage == "/of/spec"
    assert portable(tiny_spec(storage="/of/spec"), "file:///of/option", None).storage == "/of/option"
    with pytest.raises(UserError, match=r"storage: relative is a relative path"):
        portable(tiny_spec(storage="relative"), None, None)


def test_relative_images_are_refused_and_absolute_ones_are_not() -> None:
    with pytest.raises(UserError, match=r"^data.source: pictures/cats is a relative path.*--set data.source=/"):
        portable(tiny_spec(data__source="pictures/cats"), "/store", None)
    assert portable(tiny_spec(data__source="/pictures"), "/store", None).data.source == "/pictures"
    assert portable(tiny_spec(), "/store", None).data.source == "digits"
    assert portable(tiny_spec(data__source="s3://bucket/set"), "/store", None).data.source == "s3://bucket/set"
    with pytest.raises(UserError, match=r"^data.cache.folder: cache is a relative path"):
        portable(tiny_spec(data__cache={"folder": "cache"}), "/store", None)


@pytest.mark.parametrize("uri", ["mlruns", "sqlite:///mlflow.db", "sqlite://", "file://mlruns"])
def test_a_relative_tracker_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^tracking.uri: .* is a relative path"):
        portable(tiny_spec(), "/store", None)


@pytest.mark.parametrize("uri", ["http://mlflow:5000", "sqlite:////abs/mlflow.db", "/abs", "file:///abs", "databricks"])
def test_other_trackers_travel_with_the_spec(uri: str) -> None:
    assert portable(tiny_spec(), "/store", uri).tracking.uri == uri


def test_the_entrypoint_is_one_command_whatever_the_paths_hold() -> None:
    spec = portable(tiny_spec(), "/a store/$HOME'; rm", "sqlite:////x y/m.db")
    words = ["python", "-m", "jobs", "run", "spec.yaml", "--json", "--storage", "/a store/$HOME'; rm"]
    words += ["--tracking-uri", "sqlite:////x y/m.db", "--set", "ray.address=auto"]
    assert shlex.split(entrypoint(spec, "run")) == words
    assert "--tracking-uri" not in entrypoint(portable(tiny_spec(), "/store", None), "train")


def test_the_working_dir_is_the_spec_and_the_sources_of_this_installation(tmp_path: Path) -> None:
    spec = portable(tiny_spec(train__images=512), "/store", None)
    size = fill_working_dir(tmp_path, spec)
    files = {f.relative_to(tmp_path): f for f in tmp_path.rglob("*") if f.is_file()}
    assert load_spec(files.pop(Path("spec.yaml"))) == spec
    assert size > sum(f.stat().st_size for f in files.values()) > 100_000
    assert {f.suffix for f in files} <= {".py", ".yaml", ""}
    assert {f.parts[0] for f in files if f.suffix} == set(PACKAGES)
    assert not [f for f in files if "__pycache__" in f.parts]
    for name in ("ddpm_core/unet.py", "pipelines/train/loop.py", "jobs/presets/digits.yaml", "jobs/__main__.py"):
        assert files[Path(name)].read_bytes() == (Path(__file__).parents[3] / name).read_bytes()


def test_from_the_working_dir_the_copies_are_imported_and_know_their_version(tmp_path: Path) -> None:
    fill_working_dir(tmp_path, portable(tiny_spec(), "/store", None))
    code = "import jobs.cli, pipelines.spec; print(jobs.cli.__file__); print(pipelines.spec.__file__)"
    code += "; from importlib.metadata import distribution as d; print(d('ddpm-pipelines').locate_file(''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(Path(line).is_relative_to(tmp_path) or line == "." for line in done.stdout.split()), done.stdout


def test_a_job_finds_ray_s_python_and_hears_interrupts_where_the_head_did_not() -> None:
    module, function = SETUP.rsplit(".", 1)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"from {module} import {function}; {function}()\n"
        "import shutil; print(shutil.which('python')); print(signal.getsignal(signal.SIGINT).__name__)"
    )
    env = {**os.environ, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(Path(sys.executable).parent / "python"), "default_int_handler"]
