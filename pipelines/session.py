"""What every verb works with: the store, the tracker, the cluster, and somebody to tell."""

import os
from dataclasses import dataclass

from pipelines.cluster import Cluster
from pipelines.progress import Progress
from pipelines.spec import Spec
from pipelines.store import Place, check_store
from pipelines.tracking import Address, Tracker, set_mlflow_up

DEFAULT_STORE = "ddpm-store"


@dataclass(frozen=True)
class Session:
    store: Place
    tracker: Tracker
    cluster: Cluster
    progress: Progress

    @property
    def tracking_uri(self) -> str:
        return self.tracker.address.uri


def storage_of(spec: Spec | None, storage: str | None) -> str:
    """Where the store is: `storage` (--storage), else the spec's, else $DDPM_STORAGE, else ./ddpm-store."""
    return storage or (spec.storage if spec else None) or os.environ.get("DDPM_STORAGE") or DEFAULT_STORE


def open_session(
    cluster: Cluster,
    progress: Progress,
    spec: Spec | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
) -> Session:
    """Resolve store and tracker once. UserError where a spec's store cannot be written, or is on a server that a store
    cannot be on."""
    set_mlflow_up()
    store = Place.of(storage_of(spec, storage))
    tracking = spec.tracking if spec else None
    address = Address.of(tracking_uri or (tracking.uri if tracking else None), store)
    if spec is not None:
        check_store(store)
    tracker = Tracker(address, tracking.experiment if tracking else "ddpm", store)
    return Session(store, tracker, cluster, progress)
