"""One trial of a sweep, inside its own process: train, report at every checkpoint, score the samples at the end.

One-worker trials run the loop in Tune's own actor; larger ones start a Ray Train group from there.
"""

import math
from collections.abc import Mapping
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.errors import Failed
from pipelines.evaluate.job import sampled_frechet
from pipelines.evaluate.likelihood import held_out_bits
from pipelines.models import of_checkpoint
from pipelines.spec import Spec, parse_spec
from pipelines.store import Place
from pipelines.train.group import fit
from pipelines.train.loop import Trainer, train
from pipelines.train.run import Run

METRIC = "bits_per_dim"
CLOCK = "images"


def run_trial(config: Mapping[str, Any]) -> None:
    """Train one trial, reporting its held-out bits/dim at every checkpoint, then score its samples."""
    spec = parse_spec(config["trial"])
    dataset, store = Dataset.open(Place.of(config["dataset"])), Place.of(config["store"])
    run = Run.of(spec, dataset.digest, store)
    try:
        with run.driving():
            _train(spec, dataset, run)
        run.checkpoints.pin(spec.train.total_steps)
        model = of_checkpoint(run, spec.train.total_steps)
        bits = held_out_bits(model, dataset, spec)
        frechet = sampled_frechet(model, dataset, spec, store, config["frechet_images"])
    except Failed as diverged:  # a result, and the same one however often it is tried
        images = (run.checkpoints.latest_step() or 0) * spec.train.global_batch
        _tune_report({CLOCK: images, METRIC: math.inf, "finished": 0, "diverged": str(diverged)})
        return
    _tune_report(
        {CLOCK: spec.train.total_steps * spec.train.global_batch, METRIC: bits, "frechet": frechet, "finished": 1}
    )


def _train(spec: Spec, dataset: Dataset, run: Run) -> None:
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"score": None})})  # it reports its own
    if spec.train.most_workers == 1:
        train(spec, dataset, run, at_checkpoint=_report)
    else:
        from ray.tune.integration.ray_train import TuneReportCallback

        fit(spec, dataset, run, callbacks=[TuneReportCallback()], at_checkpoint=_report_from_worker)


def _report(trainer: Trainer) -> None:
    if trainer.step < trainer.spec.train.total_steps:  # the last score is reported with the Frechet distance
        _tune_report(_figures(trainer))


def _report_from_worker(trainer: Trainer) -> None:
    """The same from inside a group: every rank reports, as Ray Train wants it, and rank 0's figures count."""
    import ray.train

    ray.train.report(_figures(trainer) if trainer.world.rank == 0 else {})


def _figures(trainer: Trainer) -> dict[str, float]:
    # On the way, an average of another length is as good as the snapshots so far make it; at the end it is met.
    model = of_checkpoint(trainer.run, trainer.step, most_error=math.inf)
    try:
        bits = held_out_bits(model, trainer.dataset, trainer.spec)
    except Failed:  # seen by rank 0 alone, which must not leave the others waiting: the end of the trial says so
        bits = math.inf
    return {CLOCK: trainer.images, METRIC: bits, "finished": 0}


def _tune_report(figures: Mapping[str, Any]) -> None:
    from ray import tune

    tune.report(dict(figures))
