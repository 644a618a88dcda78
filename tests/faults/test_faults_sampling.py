"""A sampling job is killed twenty times, moved between pools, filled up and damaged: the images stay the same."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipelines.data.verify import verify
from pipelines.store import Place
from tests.faults.command import command, write_spec
from tests.faults.conftest import Tell
from tests.faults.disk import fill
from tests.faults.hosts import hosts
from tests.faults.sampling import CHUNK, SETTINGS, Sampling, sampling
from tests.faults.verb import Verb, a_while, assert_gone, end_by, wait_for
from tests.s3_faults import BUCKET, FaultyProxy, faulty_proxy, s3_server, set_environment
from tests.sample.conftest import files_of

N = 200 * CHUNK + 3
LEASE_SECONDS = 30.0
"""After which the lock of one who could not give it back is free."""
KILLS = {"actor": 12, "driver": 4, "in a commit": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder."""
    folder = tmp_path_factory.mktemp("model")
    with command(write_spec(folder / "spec.yaml", 20), folder / "store") as training:
        training.start()
        training.finish()
        return training.run.place.path


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the job that nobody disturbs, made by one process."""
    with sampling(model, tmp_path_factory.mktemp("undisturbed") / "out", N, workers=1) as whole:
        whole.start()
        result = whole.finish().result
        assert (result["n"], result["made"]) == (N, N)
        return files_of(whole.out)


def assert_same_files(job: Sampling, undisturbed: dict[str, bytes]) -> None:
    assert not verify(Place.of(job.out)).findings
    assert files_of(job.out) == undisturbed


def kill(what: str, job: Sampling, moments: random.Random) -> None:
    if what == "in a commit":
        for actor in job.reach_commit():
            end_by(signal.SIGKILL, actor)
        return
    a_while(moments, 0.3)
    if what == "actor":
        actors = wait_for(job.actors, "an actor", job)
        with suppress(psutil.NoSuchProcess):
            end_by(signal.SIGKILL, moments.choice(actors))
        return
    job.kill()
    if moments.random() < 0.5:  # else the next one begins while its actors live
        assert_gone(set(job.actors()))
    job.start()


@pytest.mark.faults
def test_twenty_kills_change_no_byte(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, moments: random.Random, tell: Tell
) -> None:
    what = [name for name, times in KILLS.items() for _ in range(times)]
    moments.shuffle(what)
    with sampling(model, tmp_path / "out", N) as job:
        job.start()
        committed = 0
        for number, name in enumerate(what):
            before = committed
            wait_for(lambda before=before: job.committed() > before, "a new commit", job)  # type: ignore[misc]
            committed = job.committed()
            kill(name, job, moments)
            tell(f"  kill {number + 1}: {name} after {committed} of {-(-N // CHUNK)} chunks")
        job.finish()
        assert_same_files(job, undisturbed)


@pytest.mark.faults
def test_pools_that_grow_and_shrink_with_the_cluster_change_no_byte(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, moments: random.Random
) -> None:
    with hosts() as cluster, sampling(model, tmp_path / "out", N, workers=4, environment=cluster.token) as job:
        job.start(f"--ray={cluster.address}")
        wait_for(lambda: job.committed() > 2, "the first chunks", job)
        more = [cluster.join() for _ in range(3)]

        def artists() -> int:
            return sum(process.name().startswith("ray::Artist") for host in cluster.alive for process in host.family())

        wait_for(lambda: artists() == 4, "an actor on each host", job)
        for host in more[:2]:
            a_while(moments, 1.0)
            cluster.lose(host)
        job.finish()
        assert_same_files(job, undisturbed)


@pytest.mark.faults
def test_an_interrupt_ends_it_soon_and_the_same_command_goes_on(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, moments: random.Random
) -> None:
    with sampling(model, tmp_path / "out", N) as job:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = job.committed()
            job.start()
            wait_for(lambda before=before: job.committed() > before, "a new commit", job)  # type: ignore[misc]
            a_while(moments, 0.5)
            job.process.send_signal(number)
            ended = job.end(20)
            assert ended.code == 130, ended.said
            assert "the same command goes on with the rest" in ended.said
            assert "Traceback" not in ended.said
        job.start()
        result = job.finish().result
        assert 0 < result["made"] < N
        assert_same_files(job, undisturbed)


@pytest.mark.faults
def test_a_full_disk_ends_it_with_a_line_and_the_same_command_goes_on(
    model: Path, undisturbed: dict[str, bytes], small: Path, moments: random.Random
) -> None:
    with sampling(model, small / "out", N) as job:
        job.start()
        wait_for(lambda: job.committed() > 2, "the first chunks", job)
        filler = fill(small)
        ended = job.end()
        assert ended.code == 1, ended.said
        assert "No space left on device; what is done is kept" in ended.said
        assert "Traceback" not in ended.said
        filler.unlink()
        job.start()
        job.finish()
        assert_same_files(job, undisturbed)


@pytest.fixture
def far(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Verb, Place, FaultyProxy]]:
    """The same job on S3: the command, where its images go, and what stands before the server."""
    with s3_server() as port, faulty_proxy(port) as proxy:
        set_environment(monkeypatch, proxy.endpoint)
        out = Place.of(f"s3://{BUCKET}/samples")
        words = ["sample", str(model), f"--n={N}", f"--out={out}", "--set=sample.workers=2", *SETTINGS]
        job = Verb([*words, f"--storage={tmp_path / 'store'}"], tmp_path / "job")
        try:
            yield job, out, proxy
        finally:
            job.put_away()


def read_all(place: Place) -> dict[str, bytes]:
    """Every file, but for the lock."""
    return {name: (place / name).read() for name in place.find("")}


@pytest.mark.faults
def test_a_storage_that_fails_now_and_then_changes_no_byte(
    far: tuple[Verb, Place, FaultyProxy], undisturbed: dict[str, bytes], moments: random.Random
) -> None:
    job, out, proxy = far
    job.start()
    while job.is_running():
        with proxy.lock:
            proxy.faults += [moments.choice(("500", "503", "cut", "short", "lost")), *[None] * 20]
        time.sleep(0.2)
    job.finish()
    assert proxy.met > 20
    proxy.calm()
    assert read_all(out) == undisturbed
    assert not verify(out).findings


@pytest.mark.faults
def test_a_storage_that_is_gone_ends_it_with_a_line_and_the_same_command_goes_on(
    far: tuple[Verb, Place, FaultyProxy], undisturbed: dict[str, bytes]
) -> None:
    job, out, proxy = far
    job.start()
    wait_for(lambda: len((out / "chunks").list()) > 3, "the first chunks", job)
    proxy.always = "refuse"
    ended = job.end()
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    proxy.calm()
    kept = len((out / "chunks").list())
    time.sleep(LEASE_SECONDS)
    job.start()
    assert job.finish().result["made"] <= N - (kept - 1) * CHUNK
    assert read_all(out) == undisturbed


@pytest.mark.faults
def test_every_damaged_file_of_a_chunk_is_found_and_made_again(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, moments: random.Random
) -> None:
    with sampling(model, tmp_path / "out", N) as job:
        job.start()
        job.finish()
        for suffix in ("tar", "parquet"):
            for damage in ("cut", "flip", "gone"):
                file = job.out / f"samples-{moments.randrange(200):06d}.{suffix}"
                data = bytearray(file.read_bytes())
                if damage == "flip":
                    data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
                file.write_bytes(data[: moments.randrange(len(data))] if damage == "cut" else data)
                if damage == "gone":
                    file.unlink()
                found = subprocess.run(
                    [sys.executable, "-m", "jobs", "data", "verify", str(job.out)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert found.returncode == 1
                assert file.name in found.stdout + found.stderr
                job.start()
                assert job.finish().result["made"] == CHUNK
                assert_same_files(job, undisturbed)
