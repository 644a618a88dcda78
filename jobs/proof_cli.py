"""`ddpm verify-resume`: the promise, tried on a spec of one's own."""

from typing import Annotated

import typer

from jobs.options import Json, Overrides, SpecFile, Storage, TrackingUri, session_of
from jobs.output import print_result
from pipelines.errors import Failed


def verify_resume(
    spec: SpecFile,
    steps: Annotated[int, typer.Option(help="Steps to train, the first of the spec.", min=4)] = 40,
    kills: Annotated[int, typer.Option(help="Workers to kill, at moments drawn at random.", min=1)] = 3,
    overrides: Overrides = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Train the first steps twice, once with workers killed and their number changed, and compare all bits."""
    from jobs.tables import show_certificate
    from pipelines.pipeline import run_certificate
    from pipelines.spec import load_spec

    parsed = load_spec(spec, overrides or ())
    with session_of(parsed, storage, tracking_uri) as session:
        told = run_certificate(parsed, session, steps, kills)
    print_result(as_json, told, lambda: show_certificate(told))
    if not told["same"]:
        raise Failed(f"{spec}: the runs differ in {', '.join(told['differs'])}")
