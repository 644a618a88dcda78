"""What takes the place of samples that are damaged, so that training can go on, the same whoever reads."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipelines.data.tars import Bad
from pipelines.store import DamageError

Sample = tuple[bytes | bytearray, int]
"""Pixels, H * W * C bytes, and label."""


@dataclass(frozen=True)
class Damage:
    """A sample that could not be read, and the one that is read in its place."""

    shard: str
    row: int
    member: str
    """Empty where the whole shard cannot be read."""
    reason: str
    substitute_shard: str
    substitute_row: int


class Substitutes:
    """For a damaged sample the next readable one: in its shard from the next row on, around the end, to the row before
    it; then in the next shards, around the last, from the row of the same number on.

    That depends on what is stored alone: not on who reads, nor on what was read before. What was found out is
    remembered, at a few words for each damaged sample. Threads may share one.
    """

    def __init__(
        self,
        split: str,
        shards: Sequence[tuple[str, int]],
        read: Callable[[int, int], Sample | Bad],
        on_damage: Callable[[Damage], None] | None = None,
    ) -> None:
        """`shards` has name and samples of each; `read` reads a sample by (shard, row). `on_damage` is told each
        substitution once, one at a time, by the thread that met it."""
        self._split, self._shards, self._read, self._on_damage = split, shards, read, on_damage
        self._lock = threading.Lock()
        self._chosen: dict[tuple[int, int], tuple[int, int]] = {}
        self._damaged: dict[int, set[int]] = {}
        self._lost: set[int] = set()

    def of(self, shard: int, row: int, bad: Bad) -> Sample:
        """What is read instead of a damaged sample. DamageError where nothing of the split is readable."""
        chosen = self._chosen.get((shard, row))
        if chosen is not None and not isinstance(sample := self._read(*chosen), Bad):
            return sample
        self._remember(shard, row, bad)
        for other, other_row in self._candidates(shard, row):
            sample = self._read(other, other_row)
            if isinstance(sample, Bad):
                self._remember(other, other_row, sample)
                continue
            self._choose((shard, row), bad, (other, other_row))
            return sample
        raise DamageError(f"no sample of the split {self._split} can be read; {self._shards[shard][0]}: {bad.reason}")

    def _candidates(self, shard: int, row: int) -> Iterator[tuple[int, int]]:
        for ahead in range(len(self._shards)):
            other = (shard + ahead) % len(self._shards)
            size = self._shards[other][1]
            for step in range(size):
                candidate = (row + step) % size
                if other in self._lost:
                    break
                if candidate not in self._damaged.get(other, ()):
                    yield other, candidate

    def _remember(self, shard: int, row: int, bad: Bad) -> None:
        with self._lock:
            if bad.member:
                self._damaged.setdefault(shard, set()).add(row)
            else:
                self._lost.add(shard)

    def _choose(self, damaged: tuple[int, int], bad: Bad, chosen: tuple[int, int]) -> None:
        with self._lock:
            known = damaged in self._chosen
            self._chosen[damaged] = chosen
            if not known and self._on_damage is not None:
                names = self._shards
                self._on_damage(Damage(names[damaged[0]][0], damaged[1], *bad, names[chosen[0]][0], chosen[1]))
