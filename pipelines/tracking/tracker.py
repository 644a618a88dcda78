"""MLflow, as the verbs see it."""

import io
import logging
import shlex
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.errors import UserError, one_line
from pipelines.files import StorageError
from pipelines.progress import Progress
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.tracking.account import Account
from pipelines.tracking.address import Address, database_file, set_mlflow_up
from pipelines.tracking.mlflow_run import make_run, set_tags
from pipelines.tracking.outage import is_of_mlflow
from pipelines.tracking.record import Lineage, Records
from pipelines.tracking.shipper import Shipper
from pipelines.train.run import Run


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
            raise UserError(f"no models yet: there is no tracking database at {self.address.shown}; see --storage")
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
        database = database_file(self.address.uri)
        return self._store / "mlflow.lock" if self._store.is_local or not database else Place.of(f"{database}.lock")

    def start(self, run: Run, spec: Spec, dataset: Dataset) -> bool:
        """The run is driven: its MLflow run is made, or found again and goes on. Whether that could be done."""
        records, lineage = Records(run), Lineage.of(dataset)
        with self.tolerant("run not created yet"), records.lock():
            records.keep(lineage, self.address.name)
            client = self.client()
            account = Account(self.address.name, records, run, spec, lineage)
            account.open(client, lambda: self._experiment_id(client))
            account.go_on(client)
            return True
        return False

    def run_id(self, run: Run, spec: Spec, dataset: Dataset, parent: str | None = None) -> str:
        """The id of the run's MLflow run at this address, created at the first call."""
        records = Records(run)
        with records.lock():
            client = self.client()
            account = Account(self.address.name, records, run, spec, Lineage.of(dataset))
            return account.open(client, lambda: self._experiment_id(client), parent)

    def shipping(self, run: Run, spec: Spec, dataset: Dataset, progress: Progress, driven: bool = True) -> Shipper:
        """A block in which the run is driven, while what it owes is sent beside it; or, not `driven`, one that
        waits for a while until what a finished run owes is sent.
        """
        return Shipper(self, run, spec, dataset, progress, driven)

    def ship(self, run: Run, spec: Spec, dataset: Dataset, status: str | None = None) -> None:
        """Send what the run owes: of its journal, the rows at or before the last committed checkpoint. A failure is
        said once.

        Rows are averaged over `train.log_every` steps. `status` (FINISHED, FAILED, KILLED) ends the MLflow run.
        """
        try:
            owes = self.owes(run, spec, dataset, status)
        except Exception:  # told below, if it is still so
            owes = True
        if owes:
            with self.tolerant("metrics kept back"):
                self.settle(run, spec, Lineage.of(dataset), status)

    def settle(self, run: Run, spec: Spec, lineage: Lineage, status: str | None = None, lost: bool = False) -> int:
        """As `ship`, but a failure is raised, and the tracker is asked whether it still has the run. The number of
        steps whose rows were sent.

        `lost` is for a run that nobody drives and that did not come to its end: it is KILLED, unless its driver told
        otherwise.
        """
        records = Records(run)
        with records.lock():
            records.keep(lineage, self.address.name)
            client = self.client()
            account = Account(self.address.name, records, run, spec, lineage)
            account.open(client, lambda: self._experiment_id(client))
            if lost and account.record.status is None:
                status = "KILLED"
            if account.owes(status):
                return account.send(client, status)
            account.tidy(client)
            return 0

    def owes(self, run: Run, spec: Spec, dataset: Dataset, status: str | None = None) -> bool:
        """Whether there is anything to send, as far as is known here."""
        account = Account(self.address.name, Records(run), run, spec, Lineage.of(dataset))
        return account.owes(status) or not self.still_there()

    def catching_up(self, run: Run) -> str:
        """The command that sends what the run owes, to this tracker among others."""
        return shlex.join(["ddpm", "reconcile", run.name, "--storage", str(self._store)])

    def parent_run(self, name: str, tags: Mapping[str, str]) -> str:
        """A new MLflow run that others are children of; its id."""
        client = self.client()
        return make_run(client, self._experiment_id(client), name, uuid.uuid4().hex, tags).run_id

    def _experiment_id(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            try:
                return client.create_experiment(self._experiment, artifact_location=self.address.artifacts)
            except MlflowException:  # somebody else made it meanwhile
                experiment = client.get_experiment_by_name(self._experiment)
        return experiment.experiment_id

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
        database = database_file(self.address.uri)
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
        set_tags(client, run_id, tags)
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
            warnings.warn(f"{_trouble(error)}{self._consequence}: {one_line(error)}", stacklevel=2)
            self._tracker._down = True
        return True


def _trouble(error: Exception) -> str:
    """Who does not answer, where it is that; the error itself says all else."""
    if isinstance(error, StorageError):
        return "the store does not answer, "
    return "MLflow does not answer, " if is_of_mlflow(error) else ""
