"""The only module that sends metrics, parameters and pictures to MLflow.

The journal in the run's folder is the truth; MLflow gets a copy of the rows at or before a committed checkpoint, with
the journal's timestamps, so that a row sent twice is stored once and a kill can neither double nor lose a step. MLflow
being down slows nothing: what was not sent is sent at the next chance.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.errors import UserError, one_line
from pipelines.fields import absolute_uri
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.train.journal import Row
from pipelines.train.run import Run, environment

_RECORD = "tracking.json"
_BATCH = 1000
"""Most metrics of one request, by MLflow's own limit."""
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "file", "databricks")
_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def set_mlflow_up() -> None:
    """Our settings of MLflow, which reads them when it is imported; those of the surroundings win."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Address:
    """Where MLflow is, and where a local one keeps its artifacts."""

    uri: str
    artifacts: str | None

    @staticmethod
    def of(uri: str | None, store: Place) -> "Address":
        """The tracker of a spec: by default a sqlite file in the store, if that is a folder; else UserError."""
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and not store.is_local:
            raise UserError(
                f"tracking.uri: MLflow's database cannot lie in {store}: give --tracking-uri, a server's address or "
                "sqlite:////absolute/mlflow.db"
            )
        uri = absolute_uri(uri or f"sqlite:///{store / 'mlflow.db'}")
        if "://" in uri and uri.split("://")[0].split("+")[0] not in _SCHEMES:
            raise UserError(f"tracking.uri: {uri} is no address that MLflow knows; give one of {', '.join(_SCHEMES)}")
        if uri.startswith(("http://", "https://", "databricks")):
            return Address(uri, None)
        if store.is_local:
            return Address(uri, (store / "mlflow-artifacts").path.as_uri())
        database = _database_file(uri)
        return Address(uri, Path(f"{database}-artifacts").as_uri() if database else str(store / "mlflow-artifacts"))


class Tracker:
    """MLflow, seen from a run."""

    def __init__(self, address: Address, experiment: str, store: Place) -> None:
        self.address = address
        self._experiment = experiment
        self._store = store
        self._down = False

    def existing(self) -> str:
        """The address, for those who only read. UserError where no local database has been made yet."""
        if not self.still_there():
            raise UserError(f"no models yet: there is no tracking database at {self.address.uri}; see --storage")
        return self.address.uri

    def client(self) -> Any:
        """An MLflow client of this address; the database of a local one is made at the first use."""
        set_mlflow_up()
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        if not self.address.uri.startswith("sqlite:"):
            return MlflowClient(tracking_uri=self.address.uri, registry_uri=self.address.uri)
        # Two first users at once would both create the tables, and one of them fail.
        with self._lock_file().lock("the tracking database", wait=True):
            client = MlflowClient(tracking_uri=self.address.uri, registry_uri=self.address.uri)
            client.search_experiments(max_results=1)
        return client

    def _lock_file(self) -> Place:
        database = _database_file(self.address.uri)
        return self._store / "mlflow.lock" if self._store.is_local or not database else Place.of(f"{database}.lock")

    def start(self, run: Run, spec: Spec, dataset: Dataset) -> None:
        """Create the run's MLflow run, or find it again; params and lineage are written once."""
        with self.tolerant("run not created yet"):
            self.run_id(run, spec, dataset)

    def run_id(self, run: Run, spec: Spec, dataset: Dataset, parent: str | None = None) -> str:
        """The id of the run's MLflow run at this address, created at the first call."""
        client = self.client()
        records = _records(run)
        known = records.get(self.address.uri)
        if known is None or not _exists(client, known["run_id"]):
            known = self._create(client, run, dataset, parent)
            _remember(run, {**records, self.address.uri: known})
        run_id = known["run_id"]
        if not known["described"]:
            _log_params(client, run_id, spec)
            _log_dataset(client, run_id, dataset)
            _set_tags(client, run_id, {f"env.{k}": v for k, v in environment().items()})
            _remember(run, {**records, self.address.uri: {**known, "described": True}})
        return run_id

    def _create(self, client: Any, run: Run, dataset: Dataset, parent: str | None) -> dict[str, Any]:
        tags = {"ddpm.run": run.name, "ddpm.place": str(run.place), "ddpm.dataset_digest": dataset.digest}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        made = client.create_run(self._experiment_id(client), run_name=run.name, tags=tags)
        return {"run_id": made.info.run_id, "shipped_step": 0, "described": False}

    def parent_run(self, name: str, tags: Mapping[str, str]) -> str:
        """A new MLflow run that others are children of; its id."""
        client = self.client()
        return client.create_run(self._experiment_id(client), run_name=name, tags=dict(tags)).info.run_id

    def _experiment_id(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            try:
                return client.create_experiment(self._experiment, artifact_location=self.address.artifacts)
            except MlflowException:  # somebody else made it meanwhile
                experiment = client.get_experiment_by_name(self._experiment)
        return experiment.experiment_id

    def ship(self, run: Run, spec: Spec, dataset: Dataset, final: bool = False) -> None:
        """Send the journal's rows that lie at or before the last committed checkpoint and were not sent yet.

        Rows are averaged over `train.log_every` steps, in intervals aligned to its multiples, so that a restart
        changes none. `final` sends the last interval though it be shorter, and ends the MLflow run; a longer run
        sends that interval again, whole.
        """
        steps, every = run.checkpoints.steps(), spec.train.log_every
        known = _records(run).get(self.address.uri, {"shipped_step": 0})
        done = known["shipped_step"]
        if not steps or (steps[-1] <= done and not final):
            return
        if known.get("ended_step") == steps[-1] and self.still_there():
            return
        with self.tolerant("metrics kept back"):
            run_id = self.run_id(run, spec, dataset)
            client = self.client()
            intervals = list(_intervals(run.journal.read(steps[-1], after=done), every, final))
            for batch in _batches(_metrics(intervals), _BATCH):
                client.log_batch(run_id, metrics=batch)
            whole = [interval[-1].step for interval in intervals if interval[-1].step % every == 0]
            records = _records(run)
            record = {**records[self.address.uri], "shipped_step": max([done, *whole])}
            _remember(run, {**records, self.address.uri: record})
            if final:
                client.set_terminated(run_id)
                _remember(run, {**records, self.address.uri: {**record, "ended_step": steps[-1]}})

    def pictures(self, run_id: str, pictures: Mapping[str, bytes]) -> None:
        """Attach PNG files."""
        from PIL import Image

        client = self.client()
        for name, data in pictures.items():
            client.log_image(run_id, Image.open(io.BytesIO(data)).convert("RGB"), artifact_file=name)

    def scores(self, run_id: str, scores: Mapping[str, float], step: int) -> None:
        """Attach figures of merit, at the step they belong to."""
        client = self.client()
        for name, value in scores.items():
            client.log_metric(run_id, name, value, step=step)

    def json(self, run_id: str, name: str, value: Any) -> None:
        """Attach a JSON file."""
        self.client().log_dict(run_id, value, name)

    def certificate(self, name: str, told: Mapping[str, Any]) -> None:
        """Log a run of its own that says whether a training goes on to the same bits."""
        tags = {"ddpm.kind": "certificate", "ddpm.run": name, "ddpm.same_bits": str(told["same"]).lower()}
        run_id = self.parent_run(f"verify-resume {name}", tags)
        self.json(run_id, "certificate.json", told)
        self.scores(run_id, {"lost_steps": sum(kill["lost"] for kill in told["kills"])}, step=told["steps"])
        self.client().set_terminated(run_id)

    def still_there(self) -> bool:
        """Whether what was recorded at this address can be there: a local database's file exists."""
        database = _database_file(self.address.uri)
        return database is None or database.exists()

    def has_version(self, name: str, version: int, model: str) -> bool:
        """Whether the registry holds this version, of the model of this identity."""
        from mlflow.exceptions import MlflowException

        if not self.still_there():
            return False
        try:
            found = self.client().get_model_version(name, str(version))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return found.tags.get("model") == model

    def champion(self, name: str) -> int | None:
        """The version that has the alias `champion`, if there is one."""
        from mlflow.exceptions import MlflowException

        try:
            return int(self.client().get_model_version_by_alias(name, "champion").version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def finish(self, run_id: str, tags: Mapping[str, str]) -> None:
        client = self.client()
        _set_tags(client, run_id, tags)
        client.set_terminated(run_id)

    def tolerant(self, consequence: str) -> "_Tolerant":
        """A block whose failure to reach MLflow is said once, with its consequence, and stops nothing."""
        return _Tolerant(self, consequence)


class _Tolerant:
    """A failed request is said once and does not stop the run."""

    def __init__(self, tracker: Tracker, consequence: str) -> None:
        self._tracker, self._consequence = tracker, consequence

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if error is None:
            self._tracker._down = False
            return False
        if not isinstance(error, Exception):
            return False
        if not self._tracker._down:
            warnings.warn(f"MLflow does not answer, {self._consequence}: {one_line(error)}", stacklevel=2)
            self._tracker._down = True
        return True


def _database_file(uri: str) -> Path | None:
    """The file of a local database; None of any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _records(run: Run) -> dict[str, dict[str, Any]]:
    place = run.place / _RECORD
    return place.read_json() if place.exists() else {}


def _remember(run: Run, records: Mapping[str, Any]) -> None:
    (run.place / _RECORD).write_json(records)


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _log_params(client: Any, run_id: str, spec: Spec) -> None:
    from mlflow.entities import Param

    params = [Param(name, str(value)) for name, value in flatten(spec.training_fields())]
    for batch in _batches(params, 100):
        client.log_batch(run_id, params=batch)


def _log_dataset(client: Any, run_id: str, dataset: Dataset) -> None:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    source = CodeDatasetSource(tags={"place": str(dataset.place)})
    # MLflow's column holds 36 characters; the whole digest is a tag of the run.
    meta = MetaDataset(source, name=dataset.place.name, digest=dataset.digest[:36])
    client.log_inputs(run_id, [DatasetInput(meta._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])])


def _set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])


def flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested fields as (dotted name, value)."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _intervals(rows: Iterable[Row], every: int, final: bool) -> Iterator[list[Row]]:
    interval: list[Row] = []
    for row in rows:
        interval.append(row)
        if row.step % every == 0:
            yield interval
            interval = []
    if final and interval:
        yield interval


def _metrics(intervals: Iterable[list[Row]]) -> list[Any]:
    from mlflow.entities import Metric

    metrics = []
    for rows in intervals:
        last = rows[-1]
        sums: dict[str, list[float]] = {}
        for row in rows:
            for name, value in {**row.exact, **row.wall}.items():
                sums.setdefault(name, []).append(value)
        figures = {name: sum(values) / len(values) for name, values in sums.items()}
        figures["images_seen"] = last.images
        metrics += [Metric(name, value, last.time_ms, last.step) for name, value in figures.items()]
    return metrics


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
