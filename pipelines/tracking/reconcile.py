"""What the runs of a store still owe their trackers is sent now, by whoever has the store; no dataset is needed."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.errors import UserError, one_line
from pipelines.progress import Progress
from pipelines.store import Place
from pipelines.tracking.address import Address
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
    """Send what one run owes, or every tracked run of the store, to `tracking_uri`, else to where its spec says.

    A tracker that does not answer is not asked again for the next run. UserError where there is no such run.
    """
    down: dict[str, str] = {}
    done = []
    runs = [find_run(name, store)] if name is not None else list(_tracked(store))
    for position, run in enumerate(runs, start=1):
        told = _reconcile(run, store, tracking_uri, down)
        if told.error is not None:
            down[told.tracker] = told.error
        progress.advance(position, len(runs), "runs")
        done.append(told)
    return done


def _tracked(store: Place) -> Iterator[Run]:
    """Runs that were meant to be tracked: a sweep's trials are when it ends, with the sweep as their parent."""
    for name in (store / "runs").list():
        run = Run(store / "runs" / name)
        if (run.place / "run.json").exists() and Records(run).lineage is not None:
            yield run


def _reconcile(run: Run, store: Place, tracking_uri: str | None, down: dict[str, str]) -> Reconciled:
    spec, records = run.spec(), Records(run)
    address = Address.of(tracking_uri or spec.tracking.uri, store)
    steps, error = 0, down.get(address.shown)
    if error is None:
        digest = run.description()["dataset_digest"]
        lineage = records.lineage or Lineage(digest, digest[:12], "unknown")
        finished = max(run.checkpoints.steps(), default=0) >= last_step(run, spec.train)
        status = "FINISHED" if finished else None if _is_driven(run) else "KILLED"
        try:
            steps = Tracker(address, spec.tracking.experiment, store).settle(run, spec, lineage, status)
        except Exception as reason:  # of MLflow's client, of what is below it, or of the network
            error = one_line(reason)
    return Reconciled(run.name, address.shown, steps, error)


def _is_driven(run: Run) -> bool:
    try:
        with (run.place / "lock").lock(f"run {run.name}"):
            return False
    except UserError:
        return True
