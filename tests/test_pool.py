"""Pools: every chunk once, whoever dies, hangs or comes late."""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines import pool as pools
from pipelines.cluster import Cluster
from pipelines.errors import Failed
from pipelines.pool import DEATHS, Crew, Pool
from pipelines.progress import Progress


class Worker:
    """Does what its chunk, a word, says, and notes that it did."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def ready(self) -> None:
        pass

    def do(self, shared: tuple[Any], chunk: str) -> str:
        import ray

        assert ray.get(shared[0]) == "shared"
        tries = len(list(self._notes.glob(f"{chunk}.*")))
        (self._notes / f"{chunk}.{os.getpid()}.{time.monotonic_ns()}").touch()
        verb, _, argument = chunk.partition("-")
        if verb == "die" and tries < int(argument.partition("-")[0]):
            os._exit(1)
        if verb == "hang" and not tries:
            time.sleep(60)
        if verb == "late" and not tries:  # fails when another has done it
            while len(list(self._notes.glob(f"{chunk}.*"))) < 2:
                time.sleep(0.05)
            time.sleep(0.5)
            (self._notes / "overtaken").touch()
            if argument == "dies":
                os._exit(1)
            raise ValueError(chunk)
        if verb == "raise":
            raise ValueError(argument)
        if verb == "second":  # the first goes on when the second has failed
            if tries:
                (self._notes / "failed").touch()
                raise ValueError(argument)
            while not (self._notes / "failed").exists():
                time.sleep(0.05)
            time.sleep(1.0)
        if verb == "linger":  # till a file of this name has been there for a moment
            while not (self._notes / argument).exists():
                time.sleep(0.05)
            time.sleep(1.0)
        if verb == "wait":
            time.sleep(0.2)
        return chunk


class Unable(Worker):
    """Cannot begin."""

    def __init__(self) -> None:
        raise OSError("no such device")


class OnlyOneAble(Worker):
    """Only the first of them can be made."""

    def __init__(self, notes: Path) -> None:
        super().__init__(notes)
        (notes / "begun").touch(exist_ok=False)


class OnlyOne(Worker):
    """Only the first of them begins."""

    def ready(self) -> None:
        try:
            (self._notes / "begun").touch(exist_ok=False)
        except FileExistsError:
            os._exit(1)


def pool_of(cluster: Cluster, notes: Path, chunks: list[str], most: int = 2, cpus: float = 1.0) -> Pool:
    crew = Crew(Worker, (notes,), ("shared",), most, {"CPU": cpus}, "field", "try less")
    return Pool(cluster, crew, chunks)


def done_by(pool: Pool) -> Counter[str]:
    return Counter(result for _, result in pool.results())


def test_each_chunk_comes_once_with_its_place(cluster: Cluster, tmp_path: Path) -> None:
    chunks = [f"do-{i}" for i in range(20)]
    found = list(pool_of(cluster, tmp_path, chunks).results())
    assert sorted(found) == sorted(enumerate(chunks))
    assert len(list(tmp_path.iterdir())) == 20


def test_a_chunk_that_hangs_is_given_to_another(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "_SLOW_SECONDS", 1.0)
    began = time.monotonic()
    chunks = ["hang-0", *(f"do-{i}" for i in range(8))]
    assert done_by(pool_of(cluster, tmp_path, chunks)) == Counter(chunks)
    assert time.monotonic() - began < 30
    assert len(list(tmp_path.glob("hang-0.*"))) == 2


@pytest.mark.parametrize("way", ["raises", "dies"])
def test_who_is_overtaken_may_fail(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Its failure is heard of, since the pool is still at work then, and changes nothing."""
    monkeypatch.setattr(pools, "_SLOW_SECONDS", 0.5)
    chunks = [f"late-{way}", *(f"do-{i}" for i in range(4)), "linger-overtaken", *(f"wait-{i}" for i in range(5))]
    pool = pool_of(cluster, tmp_path, chunks, most=3, cpus=0.5)
    assert done_by(pool) == Counter(chunks)
    assert pool.deaths == (way == "dies")


def test_processes_that_die_are_replaced_and_nothing_is_lost_or_doubled(cluster: Cluster, tmp_path: Path) -> None:
    chunks = ["die-1-0", "do-1", "die-2-2", "do-3"]
    pool = pool_of(cluster, tmp_path, chunks)
    assert done_by(pool) == Counter(chunks)
    assert pool.deaths == 3


def test_what_ends_every_process_ends_the_work(cluster: Cluster, tmp_path: Path) -> None:
    pool = pool_of(cluster, tmp_path, ["do-0", "die-99-0", "do-1"])
    with pytest.raises(Failed, match=rf"field: a process died {DEATHS} times over the same images; try less"):
        list(pool.results())
    assert pool.deaths >= DEATHS


def test_deaths_are_counted_in_a_row(cluster: Cluster, tmp_path: Path) -> None:
    """A chunk may be unlucky any number of times as long as others come to their end."""
    chunks = [f"die-{DEATHS}-0", *(f"wait-{i}" for i in range(10))]  # it is tried again behind all others
    assert done_by(pool_of(cluster, tmp_path, chunks)) == Counter(chunks)


def test_of_errors_the_first_chunks_is_raised(cluster: Cluster, tmp_path: Path) -> None:
    for most in (1, 2):
        with pytest.raises(ValueError, match=r"^first$"):
            list(pool_of(cluster, tmp_path, ["do-0", "raise-first", "raise-second", "do-1"], most).results())


def test_chunks_before_one_that_failed_are_done_and_none_after_it(cluster: Cluster, tmp_path: Path) -> None:
    """Also one that has to be done again: whoever waits for it waits no longer than it takes."""
    chunks = ["die-1-0", "raise-it", *(f"wait-{i}" for i in range(40))]
    found: list[str] = []
    with pytest.raises(ValueError, match=r"^it$"):
        found.extend(result for _, result in pool_of(cluster, tmp_path, chunks).results())
    assert "die-1-0" in found
    assert len(list(tmp_path.glob("die-1-0.*"))) == 2
    assert len(list(tmp_path.glob("wait-*"))) < 20


def test_a_chunk_that_fails_for_one_actor_and_not_for_the_other_is_done(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second try of a straggler that fails is not its result while the first is at it still."""
    monkeypatch.setattr(pools, "_SLOW_SECONDS", 0.5)
    chunks = ["second-raises", *(f"do-{i}" for i in range(4))]
    assert done_by(pool_of(cluster, tmp_path, chunks)) == Counter(chunks)
    assert len(list(tmp_path.glob("second-raises.*"))) == 2


def test_who_cannot_begin_is_told_in_a_line(cluster: Cluster, tmp_path: Path) -> None:
    crew = Crew(Unable, (), ("shared",), 2, {"CPU": 1}, "field", "try less")
    with pytest.raises(Failed, match=r"^field: a process cannot begin: .*no such device$"):
        list(Pool(cluster, crew, ["do-0", "do-1"]).results())


@pytest.mark.parametrize("kind", [OnlyOne, OnlyOneAble])
def test_those_that_are_at_work_go_on_where_no_other_begins(cluster: Cluster, tmp_path: Path, kind: type) -> None:
    """A host that loses every process it starts ends nothing of the work of another."""
    crew = Crew(kind, (tmp_path,), ("shared",), 2, {"CPU": 0.5}, "field", "try less")
    chunks = [f"wait-{i}" for i in range(30)]
    pool = Pool(cluster, crew, chunks)
    assert done_by(pool) == Counter(chunks)
    assert pool.deaths >= 1


def test_more_than_there_is_room_for_wait_on_a_cluster_that_is_joined(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "is_own", property(lambda self: False))
    chunks = [f"wait-{i}" for i in range(12)]
    assert done_by(pool_of(cluster, tmp_path, chunks, most=4, cpus=cluster.cpus())) == Counter(chunks)
    assert len({note.name.split(".")[1] for note in tmp_path.iterdir()}) == 1  # room for one


def test_memory_is_asked_for_as_ray_has_it(cluster: Cluster, tmp_path: Path) -> None:
    crew = Crew(Worker, (tmp_path,), ("shared",), 1, {"CPU": 1, "memory": 1e6}, "field", "")
    assert done_by(Pool(cluster, crew, ["do-0"])) == Counter(["do-0"])


def test_it_is_told_of_where_nothing_is_finished_for_long(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pools, "_LONG_SECONDS", 0.5)
    monkeypatch.setattr(pools, "_LOOK_SECONDS", 0.2)

    class Told(Progress):
        def say(self, text: str) -> None:
            said.append(text)
            (tmp_path / "told").touch()

    crew = Crew(Worker, (tmp_path,), ("shared",), 1, {"CPU": 1}, "field", "")
    assert done_by(Pool(cluster, crew, ["do-0", "linger-told"], Told())) == Counter(["do-0", "linger-told"])
    assert "a process is at work; others took 0 s" in said[0]


def test_who_waits_for_room_is_told(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pools, "_SAY_SECONDS", 0.5)
    monkeypatch.setattr(Cluster, "is_own", property(lambda self: False))
    ray = cluster.connect()
    crew = Crew(Worker, (tmp_path,), ("shared",), 1, {"CPU": 1, "absent": 1}, "field", "")

    class Told(Progress):
        def say(self, text: str) -> None:
            said.append(text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Pool(cluster, crew, ["do-0"], Told()).results())
    assert "takes 1 CPU, 1 absent" in said[0]
    assert "0 absent free" in said[0]
    assert ray.is_initialized()
