"""Submission: what is refused before anything is sent, what is sent, and one real job on a real head with a token."""

import contextlib
import http.server
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from jobs.submit import ray_jobs
from jobs.submit.head import checked_address, connected, find_token
from jobs.submit.host import SETUP
from jobs.submit.package import PACKAGES, entrypoint, fill_working_dir, portable
from jobs.submit.ray_jobs import Log, exit_code_of, submit
from pipelines.errors import UserError
from pipelines.spec import load_spec
from tests.conftest import tiny_spec

VARIABLES = ("DDPM_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No store, tracker, address or token but those that a test sets."""
    for name in (*VARIABLES, "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# --- a spec that means the same on every host


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


@pytest.mark.parametrize("uri", ["mlruns", "sqlite:///mlflow.db", "sqlite://", "file://mlruns"])
def test_a_relative_tracker_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^tracking.uri: .* is a relative path"):
        portable(tiny_spec(), "/store", None)


@pytest.mark.parametrize("uri", ["http://mlflow:5000", "sqlite:////abs/mlflow.db", "/abs", "file:///abs", "databricks"])
def test_other_trackers_travel_with_the_spec(uri: str) -> None:
    assert portable(tiny_spec(), "/store", uri).tracking.uri == uri


# --- what is sent


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
        assert files[Path(name)].read_bytes() == (Path(__file__).parents[2] / name).read_bytes()


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


# --- the head: address and token


@pytest.mark.parametrize(
    "address",
    [
        *("local", "", "head:8265", "http://head", "http://:8265", "http://head:port", "http://head:99999"),
        *("ray://head:10001", "http://head:8265/api", "http://head:8265?x=1", "http://me:secret@head:8265"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"^--to .*: write it as http://HOST:PORT"):
        checked_address(address)


@pytest.mark.parametrize("address", ["http://head:8265", "https://head.example.org:443/", "http://[::1]:8265"])
def test_addresses(address: str) -> None:
    assert checked_address(address) == address.rstrip("/")


def test_the_token_is_looked_for_where_ray_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token() is None
    home = tmp_path / "home" / ".ray" / "auth_token"
    home.parent.mkdir(parents=True)
    home.write_text("of-home\n")
    assert find_token() == "of-home"
    (tmp_path / "token").write_text("of-path\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-environment")
    assert find_token() == "of-environment"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/file")
    with pytest.raises(UserError, match=r"^RAY_AUTH_TOKEN_PATH: cannot read /no/such/file"):
        find_token()


@dataclass
class Door:
    """An HTTP server that answers as a head's does: says its mode, and asks for the token if it has one."""

    token: str | None = "right"
    mode: bytes = b'{"authentication_mode": "token"}'
    headers: list[str | None] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str, authorization: str | None) -> tuple[int, bytes]:
        if path == "/api/authentication_mode":
            return 200, self.mode
        self.headers.append(authorization)
        if self.token is not None and authorization != f"Bearer {self.token}":
            return (401 if authorization is None else 403), b"Unauthorized"
        return 200, json.dumps({"version": "4", "ray_version": "2.60.0"}).encode()


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = door.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        door.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield door
        server.shutdown()


def try_to_connect(address: str) -> list[str]:
    """What was said while connecting."""
    said: list[str] = []
    with connected(address, said.append):
        return said


def test_the_token_reaches_the_head_whatever_else_the_environment_says(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert try_to_connect(door.address) == []
    assert set(door.headers) == {"Bearer right"}
    assert os.environ["RAY_ADDRESS"] == os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"


def test_a_missing_or_wrong_token_is_refused_in_one_line(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    places = r"RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token$"
    with pytest.raises(UserError, match=f"the head asks for a token: put it in {places}"):
        try_to_connect(door.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match=f"refuses this one: put its own in {places}"):
        try_to_connect(door.address)


def test_a_head_without_authentication_is_used_with_a_warning_and_not_told_the_token(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.mode, door.token = b'{"authentication_mode": "disabled"}', None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    (warning,) = try_to_connect(door.address)
    assert "asks for no token" in warning
    # (In a process that drives a cluster of its own, Ray adds that one's token by itself.)
    assert "Bearer secret" not in door.headers


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_another_server_than_a_head_is_named_as_such(door: Door, body: bytes) -> None:
    door.mode = body
    with pytest.raises(UserError, match="something else than a Ray head answers there"):
        try_to_connect(door.address)


def test_an_unreachable_head_is_named_with_the_reason() -> None:
    with pytest.raises(
        UserError, match=r"^--to http://127.0.0.1:\d+: no Ray head answers there \(Connection refused\)"
    ):
        try_to_connect(f"http://127.0.0.1:{free_port()}")


# --- attempts, logs and ends, on a head made of Python


@dataclass
class FakeHead:
    """The calls of JobSubmissionClient that a submission makes."""

    known: list[tuple[str | None, str]] = field(default_factory=list)
    log: str = ""
    status: str = "SUCCEEDED"
    driver_exit_code: int | None = 0
    on_tail: Callable[[], None] = lambda: None
    sent: dict[str, Any] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=job, status=_Status(status)) for job, status in self.known]

    def submit_job(self, **what: Any) -> None:
        what["spec"] = load_spec(Path(what["runtime_env"]["working_dir"]) / "spec.yaml")
        self.sent = what

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for start in range(0, len(self.log), 7):
            yield self.log[start : start + 7]
        self.on_tail()

    def get_job_status(self, job: str) -> Any:
        return _Status(self.status)

    def get_job_logs(self, job: str) -> str:
        return self.log

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(
            status=_Status(self.status), driver_exit_code=self.driver_exit_code, message="no such node"
        )

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)
        self.status, self.driver_exit_code, self.on_tail = "STOPPED", None, lambda: None


@dataclass
class _Status:
    value: str

    def is_terminal(self) -> bool:
        return self.value in ("SUCCEEDED", "FAILED", "STOPPED")

    def __str__(self) -> str:
        return self.value


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> FakeHead:
    head = FakeHead()
    monkeypatch.setattr(ray_jobs, "connected", lambda address, say: contextlib.nullcontext(head))
    monkeypatch.setattr(ray_jobs, "_RETRY_SECONDS", 0.0)
    return head


def submit_to(head: FakeHead, **options: Any) -> tuple[ray_jobs.Submitted, list[str]]:
    said: list[str] = []
    done = submit(tiny_spec(), "http://head:8265/", "/store", None, said.append, **options)
    return done, said


def test_a_job_that_succeeded(head: FakeHead) -> None:
    head.log = '12:00 train: begins\n{"not": "the last"}\n12:01 train: done\n{"run": "tiny-1", "step": 4}\n'
    done, said = submit_to(head, verb="train")
    assert (done.status, done.exit_code, done.result) == ("SUCCEEDED", 0, {"run": "tiny-1", "step": 4})
    assert (done.job, done.address) == (head.sent["submission_id"], "http://head:8265")
    assert [line for line in said if line in head.log] == head.log.splitlines()[:3]
    assert f"http://head:8265/#/jobs/{done.job}" in said[1]
    assert " train spec.yaml --json --storage /store " in head.sent["entrypoint"]
    assert head.sent["spec"] == portable(tiny_spec(), "/store", None)
    assert "entrypoint_num_cpus" not in head.sent


def test_a_new_attempt_gets_a_new_id(head: FakeHead) -> None:
    first = submit_to(head)[0].job
    assert first.startswith("tiny-")
    assert first.endswith("-a1")
    stem = first.removesuffix("1")
    head.known = [(f"{stem}1", "FAILED"), (f"{stem}9", "STOPPED"), (f"x{stem}20", "RUNNING"), (None, "RUNNING")]
    head.known += [(f"{stem}x", "RUNNING"), ("raysubmit_abc", "RUNNING")]
    assert submit_to(head)[0].job == f"{stem}10"


def test_another_store_or_spec_is_another_job(head: FakeHead) -> None:
    said: list[str] = []
    jobs = {
        submit(spec, "http://head:1", store, None, said.append).job
        for spec, store in [(tiny_spec(), "/a"), (tiny_spec(), "/b"), (tiny_spec(seed=8), "/a")]
    }
    elsewhere = tiny_spec(ray={"address": "10.0.0.1:6379"})  # the job joins the cluster that it runs on
    assert len(jobs) == 3
    assert submit(elsewhere, "http://head:1", "/a", None, said.append).job in jobs


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_spec_that_the_cluster_runs_already_is_refused_by_name(head: FakeHead, status: str) -> None:
    running = submit_to(head)[0].job
    head.known, head.sent = [(running, status)], {}
    stop = f"ray job stop --address http://head:8265 {running}"
    with pytest.raises(UserError, match=f"^job {running} runs this spec already: .*`{stop}`$"):
        submit_to(head)
    assert not head.sent


def test_a_job_s_refusals_and_failures_are_the_client_s(head: FakeHead) -> None:
    head.status, head.driver_exit_code, head.log = "FAILED", 3, '{"a": 1}\nddpm: refused: frechet_over_floor\n'
    done, said = submit_to(head)
    assert (done.exit_code, done.result) == (3, None)
    assert said[-3:] == ['{"a": 1}', "ddpm: refused: frechet_over_floor", f"job {done.job}: FAILED, exit code 3"]
    head.driver_exit_code = None
    done, said = submit_to(head)
    assert done.exit_code == 1
    assert "no such node" in said[-2]


def test_exit_codes() -> None:
    assert [exit_code_of("FAILED", code) for code in (1, 2, 3, 130, 127, 137, -9, None)] == [1, 2, 3, 130, 1, 1, 1, 1]
    assert exit_code_of("SUCCEEDED", 0) == 0
    assert exit_code_of("STOPPED", None) == 130


def test_an_interrupt_stops_the_job(head: FakeHead) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    head.log, head.status, head.on_tail = "begins\n", "RUNNING", interrupt
    done, said = submit_to(head)
    assert head.stopped == [done.job]
    assert (done.status, done.exit_code, done.result) == ("STOPPED", 130, None)
    assert f"interrupted: asking Ray to stop job {done.job}" in said


def test_a_broken_connection_repeats_and_loses_no_line(head: FakeHead) -> None:
    times = []

    def break_off() -> None:
        times.append(1)
        head.log += f"line {len(times)}\n"
        head.status = "SUCCEEDED" if len(times) == 3 else "RUNNING"
        raise RuntimeError("WebSocket connection closed unexpectedly")

    head.on_tail = break_off
    said = submit_to(head)[1]
    assert [line for line in said if line.startswith("line")] == ["line 1", "line 2", "line 3"]


def test_a_head_that_stays_away_is_given_up(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(job: str) -> None:
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr(head, "get_job_status", away)
    monkeypatch.setattr(ray_jobs, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(ray_jobs, "_RETRY_SECONDS", 0.02)
    with pytest.raises(RuntimeError, match=r"lost the head while job tiny-.* ran, which may go on"):
        submit_to(head)


def test_a_last_line_without_its_end_counts() -> None:
    said: list[str] = []
    log = Log(said.append)
    log.take(0, 'a\n{"x"')
    log.take(2, '{"x": 1}')
    log.finish()
    assert (said, log.last_object) == (["a"], {"x": 1})


# --- a real head


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
