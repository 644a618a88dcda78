"""`ddpm sample` as somebody else's process, whose chunks are watched from outside."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipelines.store import TEMPORARY
from tests.faults.verb import PATIENCE_SECONDS, Verb, assert_gone

CHUNK = 8
SETTINGS = ("--seed=5", f"--set=sample.chunk={CHUNK}", "--set=sample.steps=50")
_LOOK_SECONDS = 0.0005


class Sampling(Verb):
    """`ddpm sample MODEL --n N --out OUT`, started again and again."""

    def __init__(
        self, model: Path, out: Path, n: int, workers: int = 2, environment: dict[str, str] | None = None
    ) -> None:
        words = ["sample", str(model), f"--n={n}", f"--out={out}", f"--set=sample.workers={workers}", *SETTINGS]
        super().__init__([*words, f"--storage={out.parent}"], out, environment)
        self.out = out

    def committed(self) -> int:
        """Chunks with a record."""
        with suppress(FileNotFoundError):
            return sum(name.endswith(".json") for name in os.listdir(self.out / "chunks"))
        return 0

    def actors(self) -> list[psutil.Process]:
        """The processes that draw."""
        return [process for process in self.family() if _is_artist(process)]

    def reach_commit(self) -> list[psutil.Process]:
        """Wait until a chunk is being committed; the processes that draw, stopped at that moment."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert time.monotonic() < end, "no commit was seen"
            assert self.process.poll() is None, self.said()
            actors = self.actors()
            for _ in range(200):
                if actors and self._unfinished():
                    for actor in actors:
                        _stop(actor)
                    if self._unfinished():
                        return actors
                    for actor in actors:
                        with suppress(psutil.NoSuchProcess):
                            actor.resume()
                time.sleep(_LOOK_SECONDS)

    def _unfinished(self) -> bool:
        """Whether a file is half-written, or a chunk has a shard and no record yet."""
        names = os.listdir(self.out)
        with suppress(FileNotFoundError):
            names += os.listdir(self.out / "chunks")
        shards = {name.removeprefix("samples-").removesuffix(".tar") for name in names if name.endswith(".tar")}
        return any(name.startswith(TEMPORARY) for name in names) or len(shards) > self.committed()


def _is_artist(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, IndexError):
        return process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[0].startswith("ray::Artist")
    return False


def _stop(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)


@contextmanager
def sampling(
    model: Path, out: Path, n: int, workers: int = 2, environment: dict[str, str] | None = None
) -> Iterator[Sampling]:
    """A command, however often it is killed, that leaves nothing behind."""
    given = Sampling(model, out, n, workers, environment)
    try:
        yield given
        if not given.is_running():
            assert_gone(given.family())
    finally:
        given.put_away()
