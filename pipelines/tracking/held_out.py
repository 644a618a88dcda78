"""Scores on held-out images, as they lie in a run's folder: `scores/STEP.json` with figures, `scores/STEP.png` with
samples. The JSON is written last, and counts.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.tracking.mlflow_run import flatten
from pipelines.train.run import Run

_FOLDER = "scores"
_PREFIX = "held_out/"


def scored_steps(run: Run, last: int) -> list[int]:
    """The steps up to `last` that have scores, rising."""
    names = (run.place / _FOLDER).list()
    steps = [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]
    return sorted(step for step in steps if step <= last)


def send_scores(client: Any, run_id: str, run: Run, step: int) -> None:
    """The figures as metrics and the picture as an artifact of the same name: sent again, they are there once."""
    from mlflow.entities import Metric

    folder = run.place / _FOLDER
    stem = next(n.removesuffix(".json") for n in folder.list() if n.endswith(".json") and int(n[:-5]) == step)
    scores, time_ms = (folder / f"{stem}.json").read_json(), (folder / f"{stem}.json").changed() // 1_000_000
    figures = [Metric(_PREFIX + name, value, time_ms, step) for name, value in _numbers(scores)]
    client.log_batch(run_id, metrics=figures)
    if f"{stem}.png" in folder.list():
        with tempfile.TemporaryDirectory() as temporary:
            picture = Path(temporary) / f"{stem}.png"
            picture.write_bytes((folder / f"{stem}.png").read())
            client.log_artifact(run_id, str(picture), artifact_path=_FOLDER)


def _numbers(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Figures by dotted name; those of a list by their place in it."""
    for name, value in flatten(scores):
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for place, number in enumerate(values):
            if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
                yield (name if values is not value else f"{name}.{place}"), float(number)
