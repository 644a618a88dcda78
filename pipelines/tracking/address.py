"""Where MLflow is."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.fields import absolute_uri
from pipelines.store import Place

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "file", "databricks")
_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_OF_STORE = "store:"


def set_mlflow_up() -> None:
    """Our settings of MLflow, which reads them when it is imported; those of the surroundings win."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Address:
    """Where MLflow is, and where a local one keeps its artifacts."""

    uri: str
    artifacts: str | None
    name: str
    """By which a run remembers what it sent there: without credentials, and of a database in the run's own store the
    path in it, for a store may be moved."""

    @property
    def shown(self) -> str:
        """The address without user, password and query."""
        return without_credentials(self.uri)

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
            raise UserError(
                f"tracking.uri: {without_credentials(uri)} is no address that MLflow knows; give one of "
                f"{', '.join(_SCHEMES)}"
            )
        return Address(uri, _artifacts(uri, store), tracker_name(uri, store))

    @staticmethod
    def named(name: str, store: Place) -> "Address":
        """The tracker that a run of this store remembers by this name. Credentials are those of the surroundings."""
        if name.startswith(_OF_STORE):
            return Address.of(f"sqlite:///{store / name.removeprefix(_OF_STORE)}", store)
        return Address.of(name, store)


def _artifacts(uri: str, store: Place) -> str | None:
    if uri.startswith(("http://", "https://", "databricks")):
        return None
    if store.is_local:
        return (store / "mlflow-artifacts").path.as_uri()
    database = database_file(uri)
    return Path(f"{database}-artifacts").as_uri() if database else str(store / "mlflow-artifacts")


def tracker_name(uri: str, store: Place) -> str:
    """See `Address.name`."""
    database = database_file(uri)
    if database is not None and store.is_local and Place.of(database).is_within(store.path):
        return _OF_STORE + database.resolve().relative_to(store.path.resolve()).as_posix()
    return without_credentials(uri)


def without_credentials(uri: str) -> str:
    """An address without user, password and query, in which databases may have one too."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.startswith(("sqlite", "file")):
        return uri
    if scheme in ("http", "https"):
        rest = re.sub(r"^[^/?#]*@", "", rest)
    # A database's password is taken up to the @, whatever it consists of.
    elif "@" in (address := rest.split("?")[0]):
        rest = address.rpartition("@")[2]
    else:
        rest = rest.rpartition("@")[2]
    return f"{scheme}://{re.split('[?#]', rest)[0]}"


def database_file(uri: str) -> Path | None:
    """The file of a local database; None of any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
