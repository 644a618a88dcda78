"""`ddpm data ...`: tars made a dataset, and looking at datasets. None of these changes an image."""

import functools
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from jobs.notices import said_as_options
from jobs.options import Json
from jobs.output import print_result, quiet_stdout
from pipelines.errors import Failed, UserError
from pipelines.progress import counted

data = typer.Typer(
    name="data",
    help="Datasets: made of tars that are there; what is in one, whether it is whole, what tells two apart.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_PNG = b"\x89PNG\r\n\x1a\n"

DatasetFolder = Annotated[
    str, typer.Argument(metavar="DATASET", help="Folder of an ingested dataset.", show_default=False)
]
Window = Annotated[int, typer.Option(help="Shards whose images are shuffled together, `data.window`.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the order, that of the spec.", min=0)]
Resize = Annotated[Literal["auto", "area", "lanczos"], typer.Option(help="auto: area to shrink, lanczos to grow.")]
HeldOut = Annotated[
    float | None,
    typer.Option(help="Share of the images kept from training [default: the source's own split, else 0.2]."),
]
Workers = Annotated[int | None, typer.Option(help="Ray tasks at a time [default: one a CPU, none for little work].")]


@data.command()
def index(
    tars: Annotated[
        str,
        typer.Argument(metavar="TARS", help="Folder of WebDataset tars, or s3://bucket/prefix.", show_default=False),
    ],
    image_size: Annotated[int, typer.Option(help="Side of the square images, pixels; the centre is taken.")],
    channels: Annotated[int, typer.Option(help="1 (grey) or 3 (RGB).")] = 3,
    resize: Resize = "auto",
    held_out: HeldOut = None,
    out: Annotated[str | None, typer.Option(help="Folder of the dataset [default: beside the tars].")] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Make a dataset of tars that are there, which stay as they are where they are."""
    from jobs.live import kept_where_interrupted, listener
    from pipelines.cluster import Cluster
    from pipelines.data.index import index as index_tars
    from pipelines.data.manifest import CARD
    from pipelines.store import Place

    with quiet_stdout(), listener() as progress, said_as_options("TARS", progress.say), Cluster(None) as cluster:
        progress.start("index", tars)
        done_before = (Place.of(out or tars) / CARD).exists()
        with kept_where_interrupted(progress):
            dataset = index_tars(
                Place.of(tars),
                None if out is None else Place.of(out),
                image_size=image_size,
                channels=channels,
                held_out=held_out,
                resize=resize,
                cluster=cluster,
                workers=workers,
                progress=lambda done, total: progress.advance(done, total, "tars"),
            )
        told = f"{len(dataset.split('train')):,} + {len(dataset.split('held-out')):,} images"
        progress.finish("index", told, skipped=done_before)
    result = {"out": str(dataset.place), **dataset.card}
    print_result(as_json, result, lambda: print(f"{dataset.place}  {dataset.digest}"))


@data.command()
def info(
    dataset: DatasetFolder,
    window: Window = 4,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(help="Images of a batch, `train.global_batch`.", min=1)] = 64,
    as_json: Json = False,
) -> None:
    """Tell what a dataset is, and how well it will be shuffled."""
    from jobs.data_tables import show_info
    from pipelines.data import inspect
    from pipelines.data.manifest import Dataset
    from pipelines.store import Place

    with quiet_stdout():
        told = inspect.info(Dataset.open(Place.of(dataset)), window=window, seed=seed, batch=batch)
    print_result(as_json, told, lambda: show_info(told))


@data.command()
def preview(
    dataset: DatasetFolder,
    split: Annotated[str, typer.Option(help="`train` or `held-out`.")] = "train",
    n: Annotated[int, typer.Option("--n", help="Number of images.", min=1, max=400)] = 100,
    out: Annotated[str, typer.Option(metavar="FILE.png", help="Picture to write.")] = "preview.png",
    window: Window = 4,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Draw the first images in the order of training on a contact sheet."""
    from jobs.live import listener
    from pipelines.data import inspect
    from pipelines.data.manifest import SPLITS, Dataset
    from pipelines.store import Place

    if split not in SPLITS:
        raise UserError(f"--split {split}: there are {' and '.join(SPLITS)}")
    file = Place.of(out)
    try:
        before = file.read() if file.exists() else None
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None
    if before is not None and not before.startswith(_PNG):
        raise UserError(f"--out {out}: there is a file that is no PNG; name another one")
    with quiet_stdout(), listener() as progress:
        opened = Dataset.open(Place.of(dataset))
        sheet = inspect.preview(opened, split, n, window=window, seed=seed)
        if before not in (None, sheet):
            progress.say(f"{file} was there, and is replaced")
        try:
            file.write(sheet)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None
    told = {"out": str(file), "split": split, "n": min(n, len(opened.split(split))), "window": window, "seed": seed}
    print_result(as_json, told, lambda: print(file))


@data.command()
def verify(dataset: DatasetFolder, workers: Workers = None, as_json: Json = False) -> None:
    """Look at every byte of tars and indices, and name all damage. Exit code 1 where there is any."""
    from jobs.data_tables import show_verification
    from jobs.live import listener
    from pipelines.cluster import Cluster
    from pipelines.data import verify as verification
    from pipelines.data.work import over_chunks
    from pipelines.store import Place

    place = Place.of(dataset)
    with quiet_stdout(), listener() as progress, Cluster(None) as cluster:
        progress.start("verify", str(place))
        share_out = functools.partial(over_chunks, cluster=cluster, workers=workers)
        result = verification.verify(place, map_shards=share_out, progress=progress)
        progress.finish("verify", f"{counted(result.images, 'image')}, {counted(len(result.findings), 'finding')}")
    print_result(as_json, asdict(result), lambda: show_verification(result))
    if result.findings:
        raise Failed(
            f"{place}: {counted(len(result.findings), 'finding')}; bring back what was changed, or make the dataset "
            "anew in another folder"
        )


@data.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a dataset.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder of another.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Tell what differs between two datasets: recipe, images, splits, labels."""
    from jobs.data_tables import show_difference
    from jobs.live import listener
    from pipelines.data.diff import compare
    from pipelines.data.manifest import Dataset
    from pipelines.store import Place

    with quiet_stdout(), listener() as progress:
        one, other = Dataset.open(Place.of(a)), Dataset.open(Place.of(b))
        progress.start("diff", f"{one.place} and {other.place}")
        told = compare(one, other, progress)
        progress.finish("diff", "the same dataset" if told.same else f"{counted(told.both, 'image')} in both")
    result = {"a": str(one.place), "b": str(other.place), **asdict(told)}
    print_result(as_json, result, lambda: show_difference(told))
