"""What every verb works with: the store, the tracker, the cluster, and somebody to tell."""

import os
from dataclasses import dataclass

from pipelines.cluster import Cluster
from pipelines.errors import UserError
from pipelines.progress import Progress
from pipelines.spec import Spec
from pipelines.store import Place, check_writable
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
    """Where the store is: `storage` (--storage), else the spec's, else $DDPM_STORAGE, else ./ddpm-store.

    UserError for an address: runs need locks and renames, which only folders have.
    """
    found = storage or (spec.storage if spec else None) or os.environ.get("DDPM_STORAGE") or DEFAULT_STORE
    if "://" in found and not found.startswith("file://"):
        raise UserError(f"storage {found}: only local folders are supported, give a path")
    return found


def open_session(
    cluster: Cluster,
    progress: Progress,
    spec: Spec | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
) -> Session:
    """Resolve store and tracker once. UserError where a spec's store cannot be written."""
    set_mlflow_up()
    store = Place.of(storage_of(spec, storage))
    if spec is not None:
        check_writable(store)
    tracking = spec.tracking if spec else None
    address = Address.of(tracking_uri or (tracking.uri if tracking else None), store)
    tracker = Tracker(address, tracking.experiment if tracking else "ddpm", store)
    return Session(store, tracker, cluster, progress)
