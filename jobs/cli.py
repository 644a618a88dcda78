"""The `ddpm` command: words in, verbs called, results printed. No logic of its own.

Every verb but `ui`, which has no end, takes `--json`: one JSON object as the last line of stdout. Progress, prose and
other libraries' prints go to stderr. Exit codes: 0 done, 1 failed, 2 bad input, 3 refused by a gate, 130 interrupted.
"""

import sys
from dataclasses import asdict
from typing import Annotated, NoReturn

import typer

from jobs.data_cli import HeldOut, Resize, Workers, data
from jobs.evaluate_cli import EXTRA, compare, evaluate
from jobs.exits import end_process
from jobs.notices import said_as_options
from jobs.options import Json, ModelName, Overrides, SpecFile, Storage, TrackingUri, session_of
from jobs.output import print_result, quiet_stdout
from jobs.proof_cli import verify_resume
from jobs.sample_cli import sample
from jobs.tracking_cli import reconcile
from pipelines.errors import Refused, UserError

app = typer.Typer(
    name="ddpm",
    help="Train diffusion models that you can trust: a run is a pure function of its spec and its data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data)
app.command()(verify_resume)
app.command()(reconcile)
app.command()(sample)
app.command(context_settings=EXTRA)(evaluate)
app.command()(compare)


def main() -> NoReturn:
    """Entry point: runs a verb and turns its end into an exit code."""
    end_process(lambda: app(standalone_mode=False))


@app.command()
def run(
    spec: SpecFile,
    overrides: Overrides = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Ingest, train, evaluate, sample, register, promote. Steps that are done are skipped."""
    from jobs.tables import show_run
    from jobs.ui import ui_command
    from pipelines.pipeline import run as run_pipeline
    from pipelines.spec import load_spec

    parsed = load_spec(spec, overrides or ())
    with session_of(parsed, storage, tracking_uri) as session:
        refused = None
        try:
            result = run_pipeline(parsed, session)
        except Refused as no:
            refused, result = no, no.result
    if refused is None or not as_json:  # as JSON, a refusal brings the result along
        print_result(as_json, asdict(result), lambda: show_run(result, ui_command(session)))
    if refused is not None:
        raise refused


@app.command()
def ingest(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="`digits`, or images: a folder, zip, tar, Parquet, IDX, npz, npy or CIFAR's binary files.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the dataset.")],
    image_size: Annotated[int, typer.Option(help="Side of the square images, pixels; the centre is taken.")],
    channels: Annotated[int, typer.Option(help="1 (grey) or 3 (RGB).")] = 1,
    resize: Resize = "auto",
    held_out: HeldOut = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep one of images with the same pixels.")
    ] = False,
    shard_images: Annotated[int, typer.Option(help="Images a shard.")] = 1000,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Images become WebDataset shards with an index. A killed ingest goes on with what is missing."""
    from jobs.live import kept_where_interrupted, listener
    from pipelines.cluster import Cluster
    from pipelines.data.ingest import ingest as ingest_source
    from pipelines.data.manifest import CARD
    from pipelines.store import Place

    with quiet_stdout(), listener() as progress, said_as_options("SOURCE", progress.say), Cluster(None) as cluster:
        progress.start("ingest", source)
        done_before = (Place.of(out) / CARD).exists()
        with kept_where_interrupted(progress):
            dataset = ingest_source(
                source,
                Place.of(out),
                image_size=image_size,
                channels=channels,
                held_out=held_out,
                shard_images=shard_images,
                resize=resize,
                drop_duplicates=drop_duplicates,
                cluster=cluster,
                workers=workers,
                progress=lambda done, total: progress.advance(done // 2, total // 2, "images"),
            )
        told = f"{len(dataset.split('train')):,} + {len(dataset.split('held-out')):,} images"
        progress.finish("ingest", told, skipped=done_before)
    print_result(
        as_json, {"out": str(dataset.place), **dataset.card}, lambda: print(f"{dataset.place}  {dataset.digest}")
    )


@app.command()
def train(
    spec: SpecFile,
    overrides: Overrides = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Train a spec's model to its last checkpoint. Ingests first where needed."""
    from pipelines.pipeline import run_training
    from pipelines.spec import load_spec

    parsed = load_spec(spec, overrides or ())
    with session_of(parsed, storage, tracking_uri) as session:
        done = run_training(parsed, session)
    print_result(as_json, done, lambda: print(f"{done['run']}  {done['checkpoint']}"))


@app.command()
def sweep(
    spec: SpecFile,
    overrides: Overrides = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Try the settings of a spec's `sweep:` section. The winner is written as a spec that `train` takes."""
    from jobs.tables import show_sweep
    from pipelines.pipeline import run_sweep
    from pipelines.spec import load_spec

    parsed = load_spec(spec, overrides or ())
    with session_of(parsed, storage, tracking_uri, for_tune=True) as session:
        outputs = run_sweep(parsed, session)
    print_result(as_json, outputs, lambda: show_sweep(outputs))


@app.command()
def export(
    model: ModelName,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; must not be there yet.")],
    form: Annotated[str, typer.Option("--format", help="`diffusers`: a folder that DDPMPipeline loads.")] = "diffusers",
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write a model in the format of another library."""
    from pipelines.interop import export_diffusers
    from pipelines.models import find_model

    if form != "diffusers":
        raise UserError(f"--format {form}: only diffusers can be written")
    with session_of(None, storage, tracking_uri) as session:
        found = find_model(model, session.store, session.tracker, overrides or (), verb="export")
        files = export_diffusers(found, out)
    print_result(as_json, {"out": out, "model": found.origin, "files": files}, lambda: print(f"{out}  {found.origin}"))


@app.command()
def register(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run: its spec's name and its identity.")],
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Register a run's last checkpoint as a version. Evaluates first where needed."""
    from pipelines.pipeline import register_finished
    from pipelines.sections import RayCluster
    from pipelines.session import storage_of
    from pipelines.store import Place
    from pipelines.train.run import find_run

    store = Place.of(storage_of(None, storage))
    spec = find_run(run, store).spec().model_copy(update={"ray": RayCluster()})  # where it ran need not be here
    with session_of(spec, str(store), tracking_uri) as session:
        outputs = register_finished(find_run(run, store), session)
    print_result(as_json, outputs, lambda: print(outputs["summary"]))


@app.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A registered model.")],
    version: Annotated[int | None, typer.Option(help="Its version; by default the newest.")] = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Make a version `champion`, if it passes its gates. They are those of the spec that it was registered with."""
    from pipelines.registry.promote import promote_by_name

    with session_of(None, storage, tracking_uri) as session:
        decision = promote_by_name(name, version, session.tracker.existing(), session.store)
    print_result(as_json, decision, lambda: print(f"{name} version {decision['version']} is champion"))


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One registered model.")] = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """List registered models, their versions and aliases."""
    from jobs.tables import show_models
    from pipelines.registry.register import list_models

    with session_of(None, storage, tracking_uri) as session:
        found = list_models(session.tracker.existing(), name)
    print_result(as_json, {"models": found}, lambda: show_models(found))


@app.command()
def submit(
    spec: SpecFile,
    to: Annotated[str, typer.Option(metavar="http://HEAD:PORT", help="The dashboard's address of a Ray head.")],
    overrides: Overrides = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Run a spec on a Ray cluster. The job's log is followed, its exit code passed on."""
    from jobs.submit.ray_jobs import submit as submit_job
    from pipelines.spec import load_spec

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    done = submit_job(load_spec(spec, overrides or (), resolve=False), to, storage, tracking_uri, say)
    print_result(as_json, asdict(done), lambda: print(f"{done.job}  {done.status}"))
    sys.exit(done.exit_code)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on this host.", min=1, max=65535)] = 5000,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Open MLflow's UI on the store's runs and models. It listens on loopback, until interrupted."""
    from jobs.ui import serve_ui

    with session_of(None, storage, tracking_uri) as session:
        session.tracker.existing()
        address = session.tracker.address
    serve_ui(address, port)
