"""Rounds of a measurement, kept as they are made, and the rows of a table that they become."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Unit = Literal["ratio", "share", "seconds", "GiB"]
Round = Mapping[str, Any]
Rounds = Mapping[str, Sequence[Round]]
"""By stage."""


@dataclass(frozen=True)
class Row:
    """Median of the rounds, lower and upper quartile, least and greatest."""

    name: str
    unit: Unit
    median: float
    low: float
    high: float
    least: float
    greatest: float
    rounds: int
    goal: float | None
    bound: float | None
    """A floor of ratios, a ceiling of shares and seconds."""

    @property
    def verdict(self) -> str:
        """Whether bound and goal are met."""
        if self.bound is None:
            return ""
        higher = self.unit == "ratio"
        if (self.median < self.bound) if higher else (self.median >= self.bound):
            return "MISSED"
        if self.goal is not None and self.median < self.goal:
            return "met, the goal is not"
        return "met"

    def to_json(self) -> dict[str, Any]:
        """The value under its unit; `low` and `high` are the quartiles."""
        bound = "floor" if self.unit == "ratio" else "ceiling"
        return {
            "name": self.name,
            self.unit: self.median,
            **{name: getattr(self, name) for name in ("low", "high", "least", "greatest", "rounds", "goal")},
            bound: self.bound,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Measure:
    """How a row is made of a stage's rounds."""

    name: str
    stage: str
    unit: Unit
    value: Callable[[Round], float]
    goal: float | None = None
    bound: float | None = None

    def row(self, rounds: Sequence[Round]) -> Row:
        values = [self.value(one) for one in rounds]
        low, high = values * 2 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")[::2]
        spread = (statistics.median(values), low, high, min(values), max(values))
        return Row(self.name, self.unit, *spread, len(values), self.goal, self.bound)


class Kept:
    """Rounds by stage, on disk after each."""

    def __init__(self, file: Path, resume: bool) -> None:
        self._file = file
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        if resume and file.exists():
            self.rounds = json.loads(file.read_text())
        file.parent.mkdir(parents=True, exist_ok=True)

    def collect(self, stage: str, count: int, measure: Callable[[int, int], Sequence[dict[str, Any]]]) -> None:
        """Measure what is missing of a stage. `measure` is given a round's number and how many are wanted, and gives
        one or more.
        """
        rounds = self.rounds.setdefault(stage, [])
        while len(rounds) < count:
            began = time.perf_counter()
            rounds += measure(len(rounds), count - len(rounds))
            beside = self._file.with_suffix(".new")
            beside.write_text(json.dumps(self.rounds))
            beside.replace(self._file)
            seconds = time.perf_counter() - began
            told = f"{stage}, round {len(rounds)} of {count}"
            print(f"{time.strftime('%H:%M:%S')}  {seconds:6.1f} s  {told}", file=sys.stderr, flush=True)


def table_of(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a table, markdown."""
    yield "| row | median (quartiles) | least to greatest | rounds | goal | bound |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in rows:
        write = _WRITTEN[row.unit]
        goal = "" if row.goal is None else write(row.goal)
        bound = "" if row.bound is None else f"{write(row.bound)}, {row.verdict}"
        spread = f"{write(row.median)} ({write(row.low)} to {write(row.high)})"
        least = f"{write(row.least)} to {write(row.greatest)}"
        yield f"| {row.name} | {spread} | {least} | {row.rounds} | {goal} | {bound} |"


_WRITTEN: dict[str, Callable[[float], str]] = {
    "ratio": lambda value: f"{value:.3f}",
    "share": lambda value: f"{100 * value:.2g} %",
    "seconds": lambda value: f"{value:.1f} s",
    "GiB": lambda value: f"{value:.2f} GiB",
}
