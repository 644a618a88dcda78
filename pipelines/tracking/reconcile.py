"""What the runs of a store still owe their trackers is sent now, by whoever has the store; no dataset is needed."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.errors import UserError, one_line
from pipelines.progress import Progress
from pipelines.spec import Spec
from pipelines.store import Place
from pipelines.tracking.address import Address
from pipelines.tracking.outage import is_outage
from pipelines.tracking.record import Lineage, Records
from pipelines.tracking.tracker import Tracker
from pipelines.train.end import last_step
from pipelines.train.run import Run, find_run


@dataclass(frozen=True)
class Reconciled:
    """What became of what a run owed."""

    run: str
    tracker: str
    steps: int
    """So many steps' rows were sent: 0 where it had all."""
    error: str | None
    """Why nothing, or not all, could be sent."""


def reconcile(store: Place, name: str | None, tracking_uri: str | None, progress: Progress) -> list[Reconciled]:
    """Send what one run owes, or every tracked run of the store, to `tracking_uri`, else to each tracker that it was
    to be told to.

    What is wrong with one run keeps no other back. A tracker that does not answer is not asked again for the next run.
    UserError where there is no such run.
    """
    down: dict[str, str] = {}
    done = []
    progress.start("reconcile")
    runs = [find_run(name, store)] if name is not None else list(_tracked(store))
    for position, run in enumerate(runs, start=1):
        done += _reconcile(run, store, tracking_uri, down)
        progress.advance(position, len(runs), "runs")
    return done


def _tracked(store: Place) -> Iterator[Run]:
    """Runs that were meant to be tracked, and those of which that cannot be told: a sweep's trials are when it ends,
    with the sweep as their parent."""
    for name in (store / "runs").list():
        run = Run(store / "runs" / name)
        if (run.place / "run.json").exists() and _is_tracked(run):
            yield run


def _is_tracked(run: Run) -> bool:
    try:
        return Records(run).lineage is not None
    except UserError:
        return True


def _reconcile(run: Run, store: Place, tracking_uri: str | None, down: dict[str, str]) -> list[Reconciled]:
    try:
        spec = run.spec()
        addresses = _addresses(run, spec, store, tracking_uri)
    except Exception as reason:  # a folder that is damaged, or another version's
        return [Reconciled(run.name, "", 0, one_line(reason))]
    return [_settle(run, spec, store, address, down) for address in addresses]


def _addresses(run: Run, spec: Spec, store: Place, tracking_uri: str | None) -> list[Address]:
    """The one that is named, else all that the run was to be told to, else the spec's."""
    names = [] if tracking_uri is not None else Records(run).names()
    if not names:
        return [Address.of(tracking_uri or spec.tracking.uri, store)]
    # The names are without credentials, which those of the surroundings may have.
    known = {}
    for uri in filter(None, (os.environ.get("MLFLOW_TRACKING_URI"), spec.tracking.uri)):
        with contextlib.suppress(UserError):
            address = Address.of(uri, store)
            known[address.name] = address
    return [known.get(name) or Address.named(name, store) for name in names]


def _settle(run: Run, spec: Spec, store: Place, address: Address, down: dict[str, str]) -> Reconciled:
    if (error := down.get(address.name)) is not None:
        return Reconciled(run.name, address.shown, 0, error)
    try:
        digest = run.description()["dataset_digest"]
        lineage = Records(run).lineage or Lineage(digest, digest[:12], "unknown")
        finished = max(run.checkpoints.steps(), default=0) >= last_step(run, spec.train)
        driven = run.is_driven()
        status = "FINISHED" if finished and not driven else None
        tracker = Tracker(address, spec.tracking.experiment, store)
        steps = tracker.settle(run, spec, lineage, status, lost=not finished and not driven)
    except Exception as reason:  # of MLflow's client, of what is below it, of the network, or of the run's own files
        if is_outage(reason):
            down[address.name] = one_line(reason)
        return Reconciled(run.name, address.shown, 0, one_line(reason))
    return Reconciled(run.name, address.shown, steps, None)
