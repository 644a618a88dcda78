"""One real job on a real head with a token."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from jobs.submit import ray_jobs
from jobs.submit.package import fill_working_dir
from jobs.submit.ray_jobs import submit
from pipelines.errors import UserError
from tests.conftest import tiny_spec
from tests.jobs.submit.conftest import free_port


@dataclass
class RayHead:
    address: str
    token_file: Path
    temp: Path


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[RayHead]:
    """`ray start --head` with a token, by one whose PATH has not this environment's `python`."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_urlsafe(32))
    temp = Path(tempfile.mkdtemp(prefix="ddpm-head-", dir="/tmp"))  # a socket's path must stay short
    port = free_port()
    ports = {name: free_port() for name in ("dashboard-agent-listen", "dashboard-agent-grpc", "ray-client-server")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0", "--num-cpus=2"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    command += [*(f"--{name}-port={number}" for name, number in ports.items()), f"--temp-dir={temp}"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000", "--metrics-export-port=0"]
    own = str(Path(sys.executable).parent)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DDPM_"))}
    environment |= {
        "PATH": os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != own),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": str(temp),
    }
    with open(tmp_path / "head.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_up(f"{address}/api/authentication_mode", process, tmp_path / "head.log")
        yield RayHead(address, token, temp)
    finally:
        end(process)
        shutil.rmtree(temp, ignore_errors=True)


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urlopen(url, timeout=2):
            return
        time.sleep(0.2)
    pytest.fail(f"the head did not come up: {log.read_text()}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a head and all that it started, and nothing else. A power cut: asked politely, it takes 15 s and more."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in psutil.wait_procs(family, timeout=3)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


@pytest.mark.cluster
def test_a_real_job_is_followed_and_ends_as_its_command_does(
    ray_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, imports = tmp_path / "store", tmp_path / "imports"
    imports.mkdir()
    spec = tiny_spec(train__workers=2, train__images=320)

    with pytest.raises(UserError, match="the head asks for a token"):
        submit(spec, ray_head.address, str(store), None, print, verb="train")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(ray_head.token_file))

    def mark_the_copies(folder: Path, spec: Any) -> int:
        # The driver and each training worker notes which file of each package it imported.
        size = fill_working_dir(folder, spec)
        with open(folder / "pipelines" / "train" / "loop.py", "a") as code:
            code.write("\nimport os, ddpm_core\nfrom pathlib import Path\n")
            code.write(f"Path({str(imports)!r}, str(os.getpid())).write_text(f'{{__file__}} {{ddpm_core.__file__}}')\n")
        return size

    monkeypatch.setattr(ray_jobs, "fill_working_dir", mark_the_copies)
    heard: list[tuple[float, str]] = []
    done = submit(
        spec, ray_head.address, str(store), None, lambda line: heard.append((time.monotonic(), line)), verb="train"
    )
    log = "\n".join(line for _, line in heard)
    assert (done.status, done.exit_code) == ("SUCCEEDED", 0), log
    assert done.result is not None
    assert Path(done.result["checkpoint"]).is_relative_to(store)
    assert Path(done.result["checkpoint"], "model.safetensors").exists()
    began = next(at for at, line in heard if "train: 2 workers start" in line)
    assert heard[-1][0] - began > 2, "the log came only when all was over"
    notes = [note.read_text().split() for note in imports.iterdir()]
    assert len(notes) >= 3, notes  # the driver and two workers
    assert all(Path(file).is_relative_to(ray_head.temp) for note in notes for file in note), notes

    missing = tiny_spec(data__source=str(tmp_path / "nowhere"))
    done = submit(missing, ray_head.address, str(store), None, lambda line: heard.append((0, line)), verb="train")
    assert (done.status, done.exit_code, done.result) == ("FAILED", 2, None)
    assert any(line.startswith("ddpm: data.source: ") for _, line in heard)
