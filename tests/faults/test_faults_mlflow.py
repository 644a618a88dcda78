"""`ddpm train` beside an MLflow that is slow, then gone, then back, or killed: each step is there once in the end."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.store import Place
from pipelines.train.run import Run
from tests.conftest import write_spec
from tests.mlflow_server import Server, history, mlflow_server, proxy_to, wait_until

STEPS = 800
INTERRUPTED_SECONDS = 20.0
PATIENCE_SECONDS = 300.0
FIELDS = {
    "train__images": STEPS * 32,
    "train__checkpoint_every": 25,
    "train__log_every": 1,
    "train__workers": 2,
    "train__oversubscribe": True,
}


class Ddpm:
    """The command, on a store of its own."""

    def __init__(self, folder: Path, uri: str) -> None:
        self._folder, self._uri = folder, uri
        self._started: list[subprocess.Popen[str]] = []
        self._spec = write_spec(folder / "spec.yaml", **FIELDS)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DDPM_", "MLFLOW_"))}
        options = ["--storage", str(self._folder / "store"), "--tracking-uri", self._uri, "--json"]
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *words, *options],
            env=ours,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def put_away(self) -> None:
        """Kill what a test that failed left."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def train(self) -> "subprocess.Popen[str]":
        return self.start("train", str(self._spec))

    @property
    def run(self) -> Run | None:
        runs = Place.of(self._folder / "store" / "runs")
        return next((Run(runs / name) for name in runs.list()), None)

    def step(self) -> int:
        """The last committed checkpoint's."""
        return max(self.run.checkpoints.steps(), default=0) if self.run is not None else 0


@contextlib.contextmanager
def ddpm_in(folder: Path, uri: str) -> Iterator[Ddpm]:
    ddpm = Ddpm(folder, uri)
    try:
        yield ddpm
    finally:
        ddpm.put_away()


def ended(process: "subprocess.Popen[str]", code: int) -> tuple[dict[str, object], str]:
    """What it printed as JSON, and what it said, after an end with this code."""
    printed, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, said
    return json.loads(printed.splitlines()[-1]) if printed else {}, said


def alive(process: "subprocess.Popen[str]", condition: Callable[[], bool]) -> Callable[[], bool]:
    def holds() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return condition()

    return holds


def sent(server: Server) -> dict[str, list[tuple[int, float]]]:
    """By MLflow run, the losses that it has."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("ddpm")
    runs = client.search_runs([experiment.experiment_id]) if experiment is not None else []
    return {run.info.run_id: history(client, run.info.run_id, "loss") for run in runs}


def assert_each_step_once(server: Server, run: Run | None) -> None:
    assert run is not None
    (losses,) = sent(server).values()
    assert losses == [(row.step, row.exact["loss"]) for row in run.journal.read(STEPS)]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))


@pytest.mark.faults
def test_an_mlflow_that_is_slow_and_then_down_delays_nothing_and_has_every_step_once_after_reconcile(
    tmp_path: Path,
) -> None:
    with mlflow_server(tmp_path) as server, proxy_to(server) as proxy, ddpm_in(tmp_path, proxy.uri) as ddpm:
        proxy.delay = 5.0
        process = ddpm.train()
        wait_until(alive(process, lambda: ddpm.step() >= 200), PATIENCE_SECONDS)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, said = ended(process, 130)
        assert time.monotonic() - began < INTERRUPTED_SECONDS, said
        kept = ddpm.step()
        assert 200 <= kept < STEPS

        proxy.delay, proxy.refuse = 0.0, True  # down for the whole of the next one
        _, said = ended(ddpm.train(), 0)
        assert said.count("MLflow does not answer") == 1, said
        assert "MLflow has not got all of run" in said
        assert ddpm.run is not None
        rows = list(ddpm.run.journal.read(STEPS, after=kept))
        waits = [(late.time_ms - early.time_ms) / 1000 for early, late in itertools.pairwise(rows)]
        assert max(waits) < 5, "no step waits for a request that fails"

        _, said = ended(ddpm.start("reconcile"), 1)
        assert "could not be sent" in said
        proxy.refuse = False
        told, _ = ended(ddpm.start("reconcile"), 0)
        (of_run,) = told["runs"]  # type: ignore[misc]
        assert of_run["steps"] >= STEPS - kept
        assert_each_step_once(server, ddpm.run)


@pytest.mark.faults
def test_an_mlflow_that_is_killed_and_started_again_holds_each_step_once(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server, ddpm_in(tmp_path, server.uri) as ddpm:
        process = ddpm.train()
        wait_until(alive(process, lambda: any(len(losses) >= 50 for losses in sent(server).values())), PATIENCE_SECONDS)
        server.kill()
        had = ddpm.step()
        wait_until(alive(process, lambda: ddpm.step() >= had + 100), PATIENCE_SECONDS)
        server.start()
        _, said = ended(process, 0)
        ended(ddpm.train(), 0)  # complete: it sends what the first may have left, where MLflow was not up by its end
        assert_each_step_once(server, ddpm.run)
        assert said.count("MLflow does not answer") <= 1, said
