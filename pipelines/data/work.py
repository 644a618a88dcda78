"""Pure work over chunks: on Ray where there is a cluster and more than a little to do, else here."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipelines.cluster import Cluster
from pipelines.errors import Failed, UserError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_SECONDS_HERE = 3.0
"""About what Ray takes to start: what is done sooner is done here."""
_RETRIES = 3
"""How often a chunk whose process died is tried again."""


def over_chunks(
    work: Callable[[Chunk], Result], chunks: Sequence[Chunk], cluster: Cluster | None = None, workers: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Yield (index of the chunk, result) as they are done.

    With a cluster, what is not done in a few seconds goes to `workers` processes of Ray (by default one a CPU); where
    their number is said, and is not 1, everything does. UserError for less than 1. The processes end with the work,
    and with them goes what it has opened there.

    `work` must be a pure function, for a chunk whose process died is run again; Failed where that is of no use. Where
    chunks fail, the error of the first of them is raised, whichever was met first, when those in hand have ended.
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
    workers = min(workers, len(chunks))
    # More workers than CPUs share them: what the user asked for, and what shows that the result does not depend on it.
    cpus = min(1.0, cluster.cpus() / workers)
    hand = ray.remote(num_cpus=cpus, max_restarts=-1, max_task_retries=_RETRIES)(_Hand)
    shared = (ray.put(work),)  # the source's list of files, say: sent once a host, not once a chunk
    hands = [hand.remote() for _ in range(workers)]
    # Chunks go to those that have begun: Ray may have no room for all of them as long as the work lasts.
    starting = {hand.ready.remote(): hand for hand in hands}
    todo = iter(enumerate(chunks))
    running: dict[Any, tuple[Any, int]] = {}
    failed: dict[int, BaseException] = {}
    following = next(todo, None)
    try:
        while running or (following is not None and not failed):
            (ready,), _ = ray.wait([*running, *starting], num_returns=1)
            done = None
            if ready in starting:
                hand = starting.pop(ready)
            else:
                hand, index = running.pop(ready)
                try:
                    done = index, ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    failed[index] = error.cause if isinstance(error.cause, Exception) else error
                except ray.exceptions.RayActorError:
                    failed[index] = Failed(
                        f"data.workers: a process died {_RETRIES + 1} times over the same images; if memory ran out, "
                        "give fewer"
                    )
            if following is not None and not failed:
                running[hand.do.remote(shared, following[1])] = hand, following[0]
                following = next(todo, None)
            if done is not None:
                yield done
    finally:
        for hand in hands:
            ray.kill(hand)
    if failed:
        raise failed[min(failed)]


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
