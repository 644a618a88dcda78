"""Words of the command line that several verbs take."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from jobs.output import quiet_stdout

SpecFile = Annotated[str, typer.Argument(metavar="SPEC", help="A spec file (YAML).", show_default=False)]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run, a checkpoint or diffusers folder, name@champion or name@VERSION.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override one field of the spec; may be repeated.")
]
Storage = Annotated[
    str | None,
    typer.Option(help="Folder of the store, or s3://bucket/prefix [default: spec, $DDPM_STORAGE, ./ddpm-store]."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow [default: spec, $MLFLOW_TRACKING_URI, mlflow.db in a store that is a folder]."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="HOST:PORT|auto", help="Join this Ray cluster [default: one is started on this host]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


@contextlib.contextmanager
def session_of(
    spec: Any, storage: str | None, tracking_uri: str | None, for_tune: bool = False, address: str | None = None
) -> Iterator[Any]:
    """What a verb works with; stdout is kept for its result. `address` is for verbs that have no spec to say it."""
    from jobs.live import listener
    from pipelines.cluster import Cluster
    from pipelines.session import open_session

    address = spec.ray.address if spec is not None else address
    with quiet_stdout(), listener() as progress, Cluster(address, for_tune) as cluster:
        yield open_session(cluster, progress, spec, storage, tracking_uri)
