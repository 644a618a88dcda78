"""What several tests of training do."""

from pathlib import Path
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec


def trained(spec: Spec, dataset: Dataset, store: Path, stop_at: int | None = None) -> Run:
    """A run trained to its end; where `stop_at` is given, in two goes, the first up to so many images."""
    run = Run.of(spec, dataset.digest, Place.of(store))
    run.describe(spec, dataset.digest)
    if stop_at is not None:
        stopped = spec.model_copy(update={"train": spec.train.model_copy(update={"images": stop_at})})
        train(stopped, dataset, run)
    train(spec, dataset, run)
    return run


SCORE = {"images": 40, "timesteps": 4, "grid": 20}
TRAIN = {"images": 640, "global_batch": 32, "slots": 4, "checkpoint_every": 50, "learning_rate": 0.002}
"""Twenty steps, and what scores are taken of."""


def scored_spec(every: int = 160, **train: Any) -> Spec:
    """Scored every so many images."""
    return tiny_spec(train={**TRAIN, "score": {**SCORE, "every_images": every}, **train})
