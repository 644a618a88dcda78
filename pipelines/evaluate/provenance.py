"""What is known of images that were drawn, of which only who drew them can tell: a part of their scores' provenance."""

from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.drawing import Settings
from pipelines.errors import UserError
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.sample.job import JOB, job_at
from pipelines.spec import Spec
from pipelines.store import DamageError


def of_model(model: Model, dataset: Dataset, spec: Spec) -> dict[str, Any]:
    """Of images that a model draws by a spec."""
    settings = Settings.of(spec.sample, class_counts=dataset.class_counts)
    known = {"model_digest": model.digest, "trained_on_digest": model.dataset_digest, "ema": model.average}
    return {**known, **_of_settings(settings, model.spec.model.classes)}


def of_samples(images: Dataset, progress: Progress) -> dict[str, Any] | None:
    """Of a sampling job's images, by its record; None of others, and, with a line, where the record cannot be read."""
    if not (images.place / JOB).exists():
        return None
    try:
        job = job_at(images.place)
    except (DamageError, UserError) as error:
        progress.say(f"warning: {error}: nothing is known of how these images were drawn")
        return None
    average = (images.place / JOB).read_json().get("average", "not recorded")
    return {"model_digest": job.model_digest, "ema": average, **_of_settings(job.settings, job.classes)}


def _of_settings(settings: Settings, classes: int | None) -> dict[str, Any]:
    drawn = {
        name: getattr(settings, name)
        for name in Settings.__dataclass_fields__
        if name not in ("seed", "labels", "class_counts")
    }
    return {**drawn, "labels": _labels(settings, classes), "sample_seed": settings.seed}


def _labels(settings: Settings, classes: int | None) -> list[int] | str | None:
    """The classes that images are drawn for, as `sample.labels` says them; None where the model knows none."""
    if classes is None:
        return None
    return list(settings.labels) or ("data" if settings.class_counts else "uniform")
