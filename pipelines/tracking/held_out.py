"""Scores on held-out images, as metrics and a picture."""

import tempfile
from pathlib import Path
from typing import Any

from pipelines.train.scores import HeldOutScore, Scores

_FOLDER = "scores"


def send_score(client: Any, run_id: str, scores: Scores, step: int) -> None:
    """The figures at their step, and the grid as an artifact of its own name: sent again, they are there once."""
    from mlflow.entities import Metric

    score, picture = scores.read(step), scores.picture(step)
    metrics = [Metric(f"held_out/{name}", value, score.time_ms, step) for name, value in _figures(score).items()]
    client.log_batch(run_id, metrics=metrics)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / picture.name
        copy.write_bytes(picture.read())
        client.log_artifact(run_id, str(copy), artifact_path=_FOLDER)


def _figures(score: HeldOutScore) -> dict[str, float]:
    """Those that are finite; bins of log-SNR are counted from 1, at the data's end."""
    bits = {"bits_per_dim": score.bits_per_dim, "bits_per_dim_low": score.low, "bits_per_dim_high": score.high}
    errors = {f"error_log_snr_bin_{k}": error for k, error in enumerate(score.error, start=1)}
    figures = {**bits, **errors, "seconds": score.seconds}
    return {name: value for name, value in figures.items() if value is not None}
