"""Pure work over chunks by a pool of Ray actors that grows and shrinks with the cluster.

An actor gets a chunk when it has begun, and the next one when it is done. One that dies is replaced, and its chunk goes
to whoever is free; a chunk that takes far longer than the others is given to an idle actor too. The first result of a
chunk is its result and the others are dropped: the work must be a pure function, which may be done twice.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipelines.cluster import Cluster
from pipelines.errors import Failed
from pipelines.progress import Progress

DEATHS = 4
"""So many processes in a row may end over one chunk, or before they have begun, while nobody finishes a chunk."""
_LOOK_SECONDS = 1.0
_SAY_SECONDS = 30.0
"""For which nobody has begun before it is said what is waited for."""
_ROUNDING = 1e-6
"""Of shares of a CPU: three thirds are one."""
_SLOW_TIMES, _SLOW_SECONDS = 3.0, 5.0
"""A chunk that takes so many times the median of the others, and at least so long, is given to a second actor."""


@dataclass(frozen=True)
class Crew:
    """What the actors of a pool are."""

    kind: type
    """A class with `ready()`, which does nothing, and `do(shared, chunk)`."""
    arguments: tuple[Any, ...]
    """Of its constructor."""
    shared: tuple[Any, ...]
    """Values that `do` takes as `ray.get` references: they travel once a host, and reach actors that begin late."""
    most: int
    resources: Mapping[str, float]
    """Of each actor, by Ray's names; all above 0."""
    blame: str
    """The field that is named where processes die."""
    advice: str
    """What to try then."""


@dataclass(frozen=True)
class _Turn:
    actor: Any
    index: int
    began: float


class Pool:
    """One crew at one list of chunks."""

    def __init__(self, cluster: Cluster, crew: Crew, chunks: Sequence[Any], progress: Progress | None = None) -> None:
        self._cluster, self._crew, self._chunks = cluster, crew, chunks
        self._progress = progress or Progress()
        self._waiting = deque(range(len(chunks)))
        self._open = set(self._waiting)
        self._starting: dict[Any, Any] = {}
        """Actors that have not begun, by what answers when they have."""
        self._idle: list[Any] = []
        self._running: dict[Any, _Turn] = {}
        self._took: list[float] = []
        self._in_a_row = Counter[int | None]()
        """Deaths by chunk, or before any, since a chunk was last finished."""
        self._errors: dict[int, BaseException] = {}
        self._quiet_since = time.monotonic()
        self.deaths = 0

    def results(self) -> Iterator[tuple[int, Any]]:
        """Yield (index of the chunk, result) as they are done; the actors end with it.

        Failed where a chunk ends every process that tries it, or none begins. Where the work itself raises, the error
        of the first such chunk is raised, whichever was met first, when those in hand have ended.
        """
        self._ray = self._cluster.connect()
        self._kind = self._ray.remote(**_options(self._crew.resources))(self._crew.kind)
        self._shared = tuple(self._ray.put(value) for value in self._crew.shared)
        try:
            while self._open and (self._running or not self._errors):
                if not self._errors:
                    self._grow()
                    self._hand_out()
                watched = [*self._running, *self._starting]
                found, _ = self._ray.wait(watched, num_returns=1, timeout=_LOOK_SECONDS)
                for answer in found:
                    if (done := self._take(answer)) is not None:
                        yield done
                self._say_if_nobody_begins()
        finally:
            for actor in [*self._starting.values(), *self._idle, *(turn.actor for turn in self._running.values())]:
                self._ray.kill(actor)
        if self._errors:
            raise self._errors[min(self._errors)]

    def _grow(self) -> None:
        """Start actors, as many as there are chunks for. On a cluster that is joined those that find no room wait: they
        are what its autoscaler goes by, and what takes over a host that comes. Our own has what it has.
        """
        most = min(self._crew.most, len(self._open))
        if self._cluster.is_own:
            room = (int(self._cluster.resource(name) / need + _ROUNDING) for name, need in self._crew.resources.items())
            most = min(most, max(1, min(room)))
        for _ in range(most - len(self._starting) - len(self._idle) - len(self._running)):
            actor = self._kind.remote(*self._crew.arguments)
            self._starting[actor.ready.remote()] = actor

    def _hand_out(self) -> None:
        """Give every idle actor a chunk: the next one, or a straggler's."""
        while self._idle:
            index = self._waiting.popleft() if self._waiting else self._straggler()
            if index is None:
                return
            if index in self._open:
                actor = self._idle.pop()
                answer = actor.do.remote(self._shared, self._chunks[index])
                self._running[answer] = _Turn(actor, index, time.monotonic())

    def _straggler(self) -> int | None:
        """The chunk that one actor alone has been at for longest, where that is too long."""
        actors = Counter(turn.index for turn in self._running.values())
        alone = [turn for turn in self._running.values() if actors[turn.index] == 1 and turn.index in self._open]
        if not alone or not self._took:
            return None
        slowest = min(alone, key=lambda turn: turn.began)
        patience = max(_SLOW_SECONDS, _SLOW_TIMES * median(self._took))
        return slowest.index if time.monotonic() - slowest.began > patience else None

    def _take(self, answer: Any) -> tuple[int, Any] | None:
        """What an actor's answer is: a chunk's first result, or nothing to tell."""
        begun, turn = self._starting.pop(answer, None), self._running.pop(answer, None)
        actor, index = (turn.actor, turn.index) if turn is not None else (begun, None)
        try:
            result = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            if index is None:
                raise  # a crew that cannot be made is our mistake
            if index in self._open:  # else another actor has done it
                self._errors[index] = error.cause if isinstance(error.cause, Exception) else error
            self._idle.append(actor)
            return None
        except self._ray.exceptions.RayError:
            self._died(actor, index)
            return None
        self._idle.append(actor)
        if index is None or index not in self._open:
            return None
        self._open.discard(index)
        assert turn is not None
        self._took.append(time.monotonic() - turn.began)
        self._in_a_row.clear()
        return index, result

    def _died(self, actor: Any, index: int | None) -> None:
        self._ray.kill(actor)  # it may only be out of reach
        self.deaths += 1
        if index is not None and index not in self._open:  # another actor has done it
            return
        self._in_a_row[index] += 1
        if self._in_a_row[index] >= DEATHS:
            over = "before it had begun" if index is None else "over the same images"
            raise Failed(f"{self._crew.blame}: a process died {DEATHS} times {over}; {self._crew.advice}")
        if index is not None and all(turn.index != index for turn in self._running.values()):
            self._waiting.append(index)  # behind all others: what ends its process is to hinder nothing else

    def _say_if_nobody_begins(self) -> None:
        now = time.monotonic()
        if self._idle or self._running:
            self._quiet_since = now
        elif now - self._quiet_since > _SAY_SECONDS:
            self._quiet_since = now
            asked = ", ".join(f"{need:g} {name}" for name, need in self._crew.resources.items())
            free = self._ray.available_resources()
            there = ", ".join(f"{free.get(name, 0):g} {name}" for name in self._crew.resources)
            self._progress.say(f"waiting for room on the cluster: a process takes {asked}, there is {there} free")


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Of `ray.remote`, for an actor that is replaced by us and not by Ray, which would do its chunk again in it."""
    ours = {"CPU": "num_cpus", "GPU": "num_gpus"}
    named = {ours[name]: need for name, need in resources.items() if name in ours}
    others = {name: need for name, need in resources.items() if name not in ours}
    return {"num_cpus": 0, **named, "resources": others, "max_restarts": 0, "max_task_retries": 0}
