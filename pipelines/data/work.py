"""Pure tasks over chunks of work: on Ray where there is a cluster and more than a little to do, else here."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from pipelines.cluster import Cluster
from pipelines.errors import UserError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_SECONDS_HERE = 3.0
"""About what Ray takes to start: what is done sooner is done here."""


def over_chunks(
    work: Callable[[Chunk], Result], chunks: Sequence[Chunk], cluster: Cluster | None = None, workers: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Yield (index of the chunk, result) as they are done.

    With a cluster, what is not done in a few seconds becomes Ray tasks, at most `workers` at a time (by default one a
    CPU); where their number is said, and is not 1, everything does. UserError for less than 1.

    `work` must be a pure function, for Ray runs a chunk again whose process died. Where chunks fail, the error of the
    first of them is raised, whichever was met first, when those in hand have ended.
    """
    if workers is not None and workers < 1:
        raise UserError(f"data.workers: {workers} is not a number of processes; give 1 or more")
    began, here = time.monotonic(), cluster is None or workers == 1
    for index, chunk in enumerate(chunks):
        late = workers is not None or time.monotonic() - began > _SECONDS_HERE
        if cluster is not None and not here and late and len(chunks) - index > 1:
            for place, result in _on_ray(work, chunks[index:], cluster, workers or cluster.cpus()):
                yield index + place, result
            return
        yield index, work(chunk)


def _on_ray(
    work: Callable[[Chunk], Result], chunks: Sequence[Chunk], cluster: Cluster, workers: int
) -> Iterator[tuple[int, Result]]:
    ray = cluster.connect()
    # More workers than CPUs share them: what the user asked for, and what shows that the result does not depend on it.
    call = ray.remote(num_cpus=min(1.0, cluster.cpus() / workers))(_call)
    shared = (ray.put(work),)  # the source's list of files, say: sent once a host, not once a chunk
    todo = iter(enumerate(chunks))
    running: dict[object, int] = {}
    failed: dict[int, BaseException] = {}
    try:
        while True:
            while not failed and len(running) < workers and (following := next(todo, None)) is not None:
                running[call.remote(shared, following[1])] = following[0]
            if not running:
                break
            (ready,), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                failed[index] = error.cause if isinstance(error.cause, Exception) else error
            else:
                yield index, result
    finally:
        for task in running:
            ray.cancel(task)
    if failed:
        raise failed[min(failed)]


def _call(shared: tuple[Any], chunk: Chunk) -> Any:
    return _received(shared[0])(chunk)


@lru_cache(maxsize=1)
def _received(work: Any) -> Callable[[Any], Any]:
    """The work behind a reference, the same object for all chunks that a process does: a source keeps what it has
    opened, and to unpack a gzipped array, say, for every chunk anew takes longer than all the rest.
    """
    import ray

    received: Callable[[Any], Any] = ray.get(work)
    return received
