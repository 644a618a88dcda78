"""Ingest shared out to processes, stopped and gone on with: the same bytes as done alone and at once."""

import functools
import os
import time
from pathlib import Path

import pytest

from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.data.work import over_chunks
from pipelines.errors import Failed, UserError
from pipelines.store import Place
from tests.data.data_helpers import draw_pictures

RECIPE = {"image_size": 10, "channels": 3, "held_out": 0.3, "shard_images": 7}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 40 pictures are scanned in six chunks."""
    monkeypatch.setattr("pipelines.data.ingest._CHUNK", 7)


def files_of(place: Place) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(place.path.iterdir())}


@pytest.mark.usefixtures("small_chunks")
def test_the_bytes_do_not_depend_on_the_number_of_workers(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    alone = ingest(str(pictures), Place.of(tmp_path / "alone"), **RECIPE)
    assert len(alone.table) > 5
    for workers in (1, 2, 3):
        out = Place.of(tmp_path / str(workers))
        shared = ingest(str(pictures), out, cluster=cluster, workers=workers, **RECIPE)
        assert shared.digest == alone.digest
        assert files_of(out) == files_of(alone.place)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("stop_at", [15, 40, 55])
def test_a_stopped_ingest_goes_on_with_what_is_missing(
    cluster: Cluster, pictures: Path, tmp_path: Path, stop_at: int
) -> None:
    """Stopped in the scan, between scan and shards, among the shards; gone on with by another number of workers."""
    out = Place.of(tmp_path / "stopped")

    def stop(done: int, total: int) -> None:
        if done >= stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(str(pictures), out, progress=stop, **RECIPE)
    written = {file: file.stat().st_mtime_ns for file in out.path.glob("*.tar")}
    assert bool(written) == (stop_at == 55)
    with pytest.raises(UserError, match="no finished dataset"):
        Dataset.open(out)
    seen: list[int] = []
    ingest(str(pictures), out, cluster=cluster, workers=2, progress=lambda done, total: seen.append(done), **RECIPE)
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert seen[0] >= 14  # two chunks of the scan were taken over, or all
    ingest(str(pictures), Place.of(tmp_path / "undisturbed"), **RECIPE)
    assert files_of(out) == files_of(Place.of(tmp_path / "undisturbed"))


@pytest.mark.usefixtures("small_chunks")
def test_images_added_after_a_stop_are_seen(pictures: Path, tmp_path: Path) -> None:
    out = Place.of(tmp_path / "out")

    def stop(done: int, total: int) -> None:
        if done >= 55:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(str(pictures), out, progress=stop, **RECIPE)
    draw_pictures(pictures, range(40, 45))
    dataset = ingest(str(pictures), out, **RECIPE)
    assert sum(split["samples"] for split in dataset.card["splits"].values()) == 45
    ingest(str(pictures), Place.of(tmp_path / "undisturbed"), **RECIPE)
    assert files_of(out) == files_of(Place.of(tmp_path / "undisturbed"))


@pytest.mark.usefixtures("small_chunks")
def test_of_several_bad_images_the_first_is_named_whoever_meets_it(
    cluster: Cluster, pictures: Path, tmp_path: Path
) -> None:
    for name in ("cat/036.png", "dog/039.png", "cat/004.png"):
        (pictures / name).write_bytes(b"broken")
    for workers in (1, 3):
        with pytest.raises(UserError, match=r"cat/004\.png: cannot be read as an image"):
            ingest(str(pictures), Place.of(tmp_path / "out"), cluster=cluster, workers=workers, **RECIPE)
        assert not (tmp_path / "out").exists()


def test_little_work_starts_no_ray() -> None:
    cluster = Cluster(None)
    cluster.connect = None  # type: ignore[assignment,method-assign]  # a call would fail
    assert list(over_chunks(abs, [-1, 2, -3], cluster)) == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(UserError, match=r"data\.workers: 0 is not a number of processes"):
        list(over_chunks(abs, [-1], cluster, workers=0))


class Opened:
    """A work that notes each time it arrives in a process, as a source would open its file then."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__dict__.update(state)
        (self.notes / f"{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, chunk: int) -> int:
        return os.getpid()


def test_a_process_receives_the_work_once_and_not_with_every_chunk(cluster: Cluster, tmp_path: Path) -> None:
    processes = {pid for _, pid in over_chunks(Opened(tmp_path), range(20), cluster, workers=2)}
    arrived = [int(note.name.split("-")[0]) for note in tmp_path.iterdir()]
    assert sorted(arrived) == sorted(processes)


def test_processes_end_with_the_work_and_hold_nothing_of_it(cluster: Cluster, tmp_path: Path) -> None:
    processes = {pid for _, pid in over_chunks(Opened(tmp_path), range(6), cluster, workers=2)}
    end = time.monotonic() + 30
    while time.monotonic() < end and any(map(is_running, processes)):
        time.sleep(0.1)
    assert not any(map(is_running, processes))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def die_first(notes: Path, chunk: int) -> int:
    """Ends its process, the first time that it has a chunk of 3; always for a chunk below 0."""
    if chunk < 0 or (chunk == 3 and not (notes / "died").exists()):
        (notes / "died").touch()
        os._exit(1)
    return chunk


def test_a_chunk_whose_process_died_is_done_again_and_not_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    work = functools.partial(die_first, tmp_path)
    assert sorted(over_chunks(work, range(6), cluster, workers=2)) == [(i, i) for i in range(6)]
    assert (tmp_path / "died").exists()
    with pytest.raises(Failed, match=r"data\.workers: a process died 4 times over the same images"):
        list(over_chunks(work, [0, -1, 2], cluster, workers=2))
