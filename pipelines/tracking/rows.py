"""Rows of a journal as metrics: averaged over intervals, in portions that a request holds."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.train.journal import Row

CLOCK = "images_seen"
"""The metric that every interval has."""
_MOST = 1000
"""Most metrics of one request, by MLflow's own limit."""


@dataclass(frozen=True)
class Portion:
    """Metrics of one request: of whole intervals, so that of each it brings all or nothing."""

    metrics: list[Any]
    last_step: int


def intervals(rows: Iterable[Row], every: int, tail: bool) -> Iterator[list[Row]]:
    """Rows between multiples of `every`, so that a restart changes none; `tail` is for those after the last one."""
    interval: list[Row] = []
    for row in rows:
        interval.append(row)
        if row.step % every == 0:
            yield interval
            interval = []
    if tail and interval:
        yield interval


def portions(intervals: Iterable[list[Row]]) -> Iterator[Portion]:
    """Metrics, as few requests as can be."""
    metrics: list[Any] = []
    last = 0
    for interval in intervals:
        more = _metrics(interval)
        if len(metrics) + len(more) > _MOST:
            yield Portion(metrics, last)
            metrics = []
        metrics += more
        last = interval[-1].step
    if metrics:
        yield Portion(metrics, last)


def _metrics(rows: list[Row]) -> list[Any]:
    from mlflow.entities import Metric

    last = rows[-1]
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in {**row.exact, **row.wall}.items():
            values.setdefault(name, []).append(value)
    figures = {name: sum(of_rows) / len(of_rows) for name, of_rows in values.items()}
    figures[CLOCK] = last.images
    return [Metric(name, value, last.time_ms, last.step) for name, value in figures.items()]
