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


def set_mlflow_up() -> None:
    """Our settings of MLflow, which reads them when it is imported; those of the surroundings win."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Address:
    """Where MLflow is, and where a local one keeps its artifacts."""

    uri: str
    artifacts: str | None

    @property
    def shown(self) -> str:
        """The address without a password."""
        return re.sub(r"(?<=://)[^/@]*@", "", self.uri)

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
        database = database_file(uri)
        return Address(uri, Path(f"{database}-artifacts").as_uri() if database else str(store / "mlflow-artifacts"))


def database_file(uri: str) -> Path | None:
    """The file of a local database; None of any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
