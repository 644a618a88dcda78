"""Pure work over chunks: on Ray where there is a cluster and more than a little to do, else here."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipelines.cluster import Cluster
from pipelines.errors import UserError
from pipelines.pool import Crew, Pool

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_SECONDS_HERE = 3.0
"""About what Ray takes to start: what is done sooner is done here."""


def over_chunks(
    work: Callable[[Chunk], Result], chunks: Sequence[Chunk], cluster: Cluster | None = None, workers: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Yield (index of the chunk, result) as they are done.

    With a cluster, what is not done in a few seconds goes to `workers` processes of Ray (by default one a CPU); where
    their number is said, and is not 1, everything does. UserError for less than 1. The processes end with the work,
    and with them goes what it has opened there.

    `work` must be a pure function; where processes die or chunks fail, it is with them as `Pool` says.
    """
    if workers is not None and workers < 1:
        raise UserError(f"data.workers: {workers} is not a number of processes; give 1 or more")
    began, here = time.monotonic(), cluster is None or workers == 1
    for index, chunk in enumerate(chunks):
        late = workers is not None or time.monotonic() - began > _SECONDS_HERE
        if cluster is not None and not here and late and len(chunks) - index > 1:
            for place, result in _on_ray(work, chunks[index:], cluster, workers or max(1, cluster.cpus())):
                yield index + place, result
            return
        yield index, work(chunk)


def _on_ray(
    work: Callable[[Chunk], Result], chunks: Sequence[Chunk], cluster: Cluster, workers: int
) -> Iterator[tuple[int, Result]]:
    workers = min(workers, len(chunks))
    # More workers than CPUs share them: what the user asked for, and what shows that the result does not depend on it.
    # A cluster may have no CPU yet: its autoscaler brings hosts when it sees what waits.
    cpus = min(1.0, max(1, cluster.cpus()) / workers)
    crew = Crew(
        kind=_Hand,
        arguments=(),
        shared=(work,),
        most=workers,
        resources={"CPU": cpus},
        blame="data.workers",
        advice="if memory ran out, give fewer",
    )
    yield from Pool(cluster, crew, chunks).results()


class _Hand:
    """A process that does chunks. It receives the work once, with the first of them: a source keeps what it has
    opened, and to unpack a gzipped array, say, for every chunk anew takes longer than all the rest.
    """

    def __init__(self) -> None:
        self._work: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Answers when the process is there."""

    def do(self, shared: tuple[Any], chunk: Any) -> Any:
        if self._work is None:
            import ray

            self._work = ray.get(shared[0])
        assert self._work is not None
        return self._work(chunk)
