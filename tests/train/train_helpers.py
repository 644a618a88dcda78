"""What several tests of training do."""

from pathlib import Path

from pipelines.data.manifest import Dataset
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.loop import train
from pipelines.train.run import Run


def trained(spec: Spec, dataset: Dataset, store: Path, stop_at: int | None = None) -> Run:
    """A run trained to its end; where `stop_at` is given, in two goes, the first up to so many images."""
    run = Run.of(spec, dataset.digest, Place.of(store))
    run.describe(spec, dataset.digest)
    if stop_at is not None:
        stopped = spec.model_copy(update={"train": spec.train.model_copy(update={"images": stop_at})})
        train(stopped, dataset, run)
    train(spec, dataset, run)
    return run
