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
_LONG_SECONDS = 120.0
"""For which nothing was finished before it is said who is at work; twice as long before it is said again."""
_END_SECONDS = 2.0
"""That actors which are ended have to be gone in."""
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
    """What an actor is at."""

    actor: Any
    index: int | None
    """Of a chunk; None while the actor begins."""
    began: float


class Pool:
    """One crew at one list of chunks."""

    def __init__(self, cluster: Cluster, crew: Crew, chunks: Sequence[Any], progress: Progress | None = None) -> None:
        self._cluster, self._crew, self._chunks = cluster, crew, chunks
        self._progress = progress or Progress()
        self._waiting = deque(range(len(chunks)))
        self._open = set(self._waiting)
        self._starting: dict[Any, _Turn] = {}
        """Actors that have not begun, by what answers when they have."""
        self._idle: list[Any] = []
        self._running: dict[Any, _Turn] = {}
        self._took: list[float] = []
        self._failed_once: set[int] = set()
        """Chunks that raised in one actor while another was at them: it is waited for, and no third one tries."""
        self._in_a_row = Counter[int | None]()
        """Deaths by chunk, or before any, since a chunk was last finished."""
        self._wave = 0.0
        """When the last death before any chunk was counted: who had begun by then died with it, of the same cause."""
        self._error: Exception | None = None
        """Of the first chunk that has failed; none after it is open any more."""
        self._quiet_since = self._done_at = time.monotonic()
        self._patience = _LONG_SECONDS
        self._cause = ""
        """Of the last actor that could not begin."""
        self.deaths = 0

    def results(self) -> Iterator[tuple[int, Any]]:
        """Yield (index of the chunk, result) as they are done; the actors end with it.

        Failed where a chunk ends every process that tries it, or none begins. Where the work itself raises, the error
        of the first such chunk is raised, whichever was met first, when all chunks before it are done.
        """
        self._ray = self._cluster.connect()
        self._kind = self._ray.remote(**_options(self._crew.resources))(self._crew.kind)
        self._shared = tuple(self._ray.put(value) for value in self._crew.shared)
        try:
            while self._open:
                self._grow()
                self._hand_out()
                watched = [*self._running, *self._starting]
                found, _ = self._ray.wait(watched, num_returns=1, timeout=_LOOK_SECONDS)
                for answer in found:
                    if (done := self._take(answer)) is not None:
                        yield done
                self._say_if_nobody_begins()
                self._say_if_nothing_is_done()
        finally:
            turns = (*self._starting.values(), *self._running.values())
            for actor in [*self._idle, *(turn.actor for turn in turns)]:
                self._ray.kill(actor)
            if self._running:  # who was overtaken is not to write when all is said to be done
                self._ray.wait([*self._running], num_returns=len(self._running), timeout=_END_SECONDS)
        if self._error is not None:
            raise self._error

    def _grow(self) -> None:
        """Start actors, as many as there are chunks for. On a cluster that is joined those that find no room wait: they
        are what its autoscaler goes by, and what takes over a host that comes. Our own has what it has. Where none has
        begun of late, those that are at work go on alone.
        """
        if self._running and self._in_a_row[None] >= DEATHS:
            return
        # A straggler's chunk is tried once more, also where it is the last one.
        most = min(self._crew.most, len(self._open) + (self._straggler() is not None))
        if self._cluster.is_own:
            room = (int(self._cluster.resource(name) / need + _ROUNDING) for name, need in self._crew.resources.items())
            most = min(most, max(1, min(room)))
        for _ in range(most - len(self._starting) - len(self._idle) - len(self._running)):
            actor = self._kind.remote(*self._crew.arguments)
            self._starting[actor.ready.remote()] = _Turn(actor, None, time.monotonic())

    def _hand_out(self) -> None:
        """Give every idle actor a chunk: the next one, or a straggler's."""
        while self._idle:
            index = self._waiting.popleft() if self._waiting else self._straggler()
            if index is None:
                return
            if index in self._open:  # else done by one who was overtaken, or no longer asked for
                actor = self._idle.pop()
                answer = actor.do.remote(self._shared, self._chunks[index])
                self._running[answer] = _Turn(actor, index, time.monotonic())

    def _straggler(self) -> int | None:
        """The chunk that one actor alone has been at for longest, where that is too long."""
        actors = Counter(turn.index for turn in self._running.values())
        tried = {index for index in self._open - self._failed_once if actors[index] == 1}
        alone = [turn for turn in self._running.values() if turn.index in tried]
        if not alone or not self._took:
            return None
        slowest = min(alone, key=lambda turn: turn.began)
        patience = max(_SLOW_SECONDS, _SLOW_TIMES * median(self._took))
        return slowest.index if time.monotonic() - slowest.began > patience else None

    def _take(self, answer: Any) -> tuple[int, Any] | None:
        """What an actor's answer is: a chunk's first result, or nothing to tell."""
        turn = self._starting.pop(answer, None) or self._running.pop(answer)
        try:
            result = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            self._failed(turn, error)
            return None
        except self._ray.exceptions.RayError as error:
            self._died(turn, error)
            return None
        self._idle.append(turn.actor)
        if turn.index is None or turn.index not in self._open:
            return None
        self._open.discard(turn.index)
        self._took.append(time.monotonic() - turn.began)
        self._done_at, self._patience = time.monotonic(), _LONG_SECONDS
        self._in_a_row.clear()
        return turn.index, result

    def _failed(self, turn: _Turn, error: Any) -> None:
        """The work raised: the result, then, of its chunk, where no other actor may still do it."""
        self._idle.append(turn.actor)
        if turn.index is None or turn.index not in self._open:
            return
        if self._is_at_work_on(turn.index):
            self._failed_once.add(turn.index)
            return
        self._error = error.cause if isinstance(error.cause, Exception) else error
        self._open = {index for index in self._open if index < turn.index}

    def _died(self, turn: _Turn, error: Any) -> None:
        self._ray.kill(turn.actor)  # it may only be out of reach
        self.deaths += 1
        if turn.index is None:
            self._never_began(turn, error)
        elif turn.index in self._open and not self._is_at_work_on(turn.index):
            self._in_a_row[turn.index] += 1
            if self._in_a_row[turn.index] >= DEATHS:
                self._give_up("over the same images")
            self._waiting.append(turn.index)  # behind all others: what ends its process is to hinder nothing else

    def _never_began(self, turn: _Turn, error: Any) -> None:
        """Those that were lost together, with their host say, count as one. One that raised may do so on its host
        alone: that is told where no other begins."""
        if getattr(error, "actor_init_failed", False):
            self._cause = _cause(error)
        if turn.began > self._wave:
            self._wave = time.monotonic()
            self._in_a_row[None] += 1
        if self._in_a_row[None] >= DEATHS and not self._running:
            if self._cause:
                raise Failed(f"{self._crew.blame}: a process cannot begin: {self._cause}")
            self._give_up("before it had begun")

    def _give_up(self, over: str) -> None:
        raise Failed(f"{self._crew.blame}: a process died {DEATHS} times {over}; {self._crew.advice}")

    def _is_at_work_on(self, index: int | None) -> bool:
        return any(turn.index == index for turn in self._running.values())

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

    def _say_if_nothing_is_done(self) -> None:
        if not self._running:
            return
        began = min(turn.began for turn in self._running.values())
        quiet = time.monotonic() - max(self._done_at, began)
        if quiet > max(self._patience, _SLOW_TIMES * median(self._took) if self._took else 0.0):
            self._patience = 2 * quiet
            others = f"; others took {median(self._took):,.0f} s" if self._took else ""
            at_work = "a process is" if len(self._running) == 1 else f"{len(self._running)} processes are"
            self._progress.say(f"nothing was finished for {quiet:,.0f} s, {at_work} at work{others}")


def _cause(error: Any) -> str:
    """The last line of what the constructor of an actor raised; Ray gives the whole traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Of `ray.remote`, for an actor that is replaced by us and not by Ray, which would do its chunk again in it."""
    ours = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    named = {ours[name]: need for name, need in resources.items() if name in ours}
    others = {name: need for name, need in resources.items() if name not in ours}
    return {"num_cpus": 0, **named, "resources": others, "max_restarts": 0, "max_task_retries": 0}
