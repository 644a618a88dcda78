"""Where a spec runs and where it is tracked: nothing here decides a bit."""

from pipelines.sections.base import Section


class Tracking(Section):
    uri: str | None = None
    """MLflow tracking URI; by default `mlflow.db` in the store."""
    experiment: str = "ddpm"


class RayCluster(Section):
    address: str | None = None
    """A Ray cluster's address ("auto": the one this host is part of); by default Ray is started for the run."""
