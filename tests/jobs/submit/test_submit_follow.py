"""Attempts, logs and ends of jobs, on a head made of Python."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.submit import ray_jobs
from jobs.submit.package import portable
from jobs.submit.ray_jobs import Log, exit_code_of, submit
from pipelines.errors import UserError
from pipelines.spec import load_spec
from tests.conftest import tiny_spec


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
