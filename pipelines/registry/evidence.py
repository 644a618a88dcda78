"""From a trained and evaluated run to a registered version that carries its evidence."""

import json
from collections.abc import Mapping
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.models import Model
from pipelines.pictures import PICTURES
from pipelines.registry.promote import EVIDENCE
from pipelines.registry.register import register
from pipelines.spec import Spec
from pipelines.tracking import Tracker
from pipelines.train.end import last_step
from pipelines.train.run import Run


def register_run(
    spec: Spec, dataset: Dataset, model: Model, training: Run, evaluation: Mapping[str, Any], tracker: Tracker
) -> tuple[int, str]:
    """Complete the run in MLflow (metrics, scores, pictures) and register its model; (version, MLflow run id)."""
    step = last_step(training, spec.train)
    run_id = tracker.run_id(training, spec, dataset)
    tracker.ship(training, spec, dataset, "FINISHED")
    tracker.scores(run_id, evaluation["evidence"], step=step)
    tracker.pictures(run_id, {name: (training.place / name).read() for name in PICTURES})
    tracker.json(run_id, "scores.json", evaluation["scores"])
    tags = {
        EVIDENCE: json.dumps(evaluation["evidence"], sort_keys=True),
        "run": training.name,
        "dataset_digest": dataset.digest,
    }
    if damaged := len(training.damage()):  # with others in their place: not all of the digest's images
        tags["damaged_training_images"] = str(damaged)
    version = register(model, spec.name, run_id, tracker.address.uri, tags)
    tracker.finish(run_id, {"ddpm.model_digest": model.digest, "ddpm.version": str(version)})
    return version, run_id
