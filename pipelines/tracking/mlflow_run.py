"""An MLflow run: made once, described once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.spec import Spec
from pipelines.tracking.record import Lineage

KEY = "ddpm.key"
"""Tag that tells two MLflow runs apart that were made by one request, and finds one whose making nobody confirmed."""
_PARAMS = 100
"""Most params of one request, by MLflow's own limit."""


@dataclass(frozen=True)
class Made:
    """An MLflow run with a certain key."""

    run_id: str
    was_there: bool
    ended: str | None
    """How, if it was there and did."""


def make_run(client: Any, experiment_id: str, name: str, key: str, tags: Mapping[str, str]) -> Made:
    """The MLflow run with this key, made where there is none; of several the oldest is kept.

    MLflow's client sends a request again that was not answered in time, and then it may have been carried out twice.
    """
    if not (before := _found(client, experiment_id, key)):
        client.create_run(experiment_id, run_name=name, tags={KEY: key, **tags})
    keep, *others = _found(client, experiment_id, key)
    for other in others:
        client.delete_run(other.run_id)
    return Made(keep.run_id, was_there=bool(before), ended=None if keep.status == "RUNNING" else keep.status)


def delete_others(client: Any, run_id: str, key: str) -> None:
    """Delete the MLflow runs that a late request made beside this one."""
    for other in _found(client, client.get_run(run_id).info.experiment_id, key):
        if other.run_id != run_id:
            client.delete_run(other.run_id)


def _found(client: Any, experiment_id: str, key: str) -> list[Any]:
    runs = client.search_runs([experiment_id], filter_string=f"tags.`{KEY}` = '{key}'")
    return sorted((run.info for run in runs), key=lambda info: (info.start_time, info.run_id))


def exists(client: Any, run_id: str) -> bool:
    """Whether the run is there, and not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def describe(client: Any, run_id: str, spec: Spec, lineage: Lineage, environment: Mapping[str, str]) -> None:
    """What does not change: params, dataset, environment. Saying it again changes nothing."""
    from mlflow.entities import Param

    params = [Param(name, str(value)) for name, value in flatten(spec.training_fields())]
    for start in range(0, len(params), _PARAMS):
        client.log_batch(run_id, params=params[start : start + _PARAMS])
    _log_dataset(client, run_id, lineage)
    set_tags(client, run_id, {f"env.{name}": value for name, value in environment.items()})


def _log_dataset(client: Any, run_id: str, lineage: Lineage) -> None:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    source = CodeDatasetSource(tags={"place": lineage.place})
    # MLflow's column holds 36 characters; the whole digest is a tag of the run.
    meta = MetaDataset(source, name=lineage.name, digest=lineage.digest[:36])
    client.log_inputs(run_id, [DatasetInput(meta._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])])


def set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])


def flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested fields as (dotted name, value)."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
