"""`ddpm reconcile`: what MLflow missed."""

from dataclasses import asdict
from typing import Annotated

import typer

from jobs.options import Json, Storage, TrackingUri
from jobs.output import print_result, quiet_stdout
from pipelines.errors import Failed
from pipelines.progress import counted


def reconcile(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run; by default all of the store.")] = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Send MLflow what runs still owe it. What it has got is not sent again."""
    from jobs.live import listener
    from jobs.tables import show_reconciled
    from pipelines.session import storage_of
    from pipelines.store import Place
    from pipelines.tracking import set_mlflow_up
    from pipelines.tracking.reconcile import reconcile as settle

    set_mlflow_up()
    with quiet_stdout(), listener() as progress:
        done = settle(Place.of(storage_of(None, storage)), run, tracking_uri, progress)
    print_result(as_json, {"runs": [asdict(told) for told in done]}, lambda: show_reconciled(done))
    if failed := [told for told in done if told.error is not None]:
        first = failed[0]
        to = f" to {first.tracker}" if first.tracker else ""
        raise Failed(
            f"{counted(len({told.run for told in failed}), 'run')} could not be sent, {first.run}{to} for one: "
            f"{first.error}; what is owed is kept, run it again when that is mended"
        )
