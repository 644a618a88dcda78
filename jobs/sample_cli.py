"""`ddpm sample`: images in bulk, single ones again, and how they come out of noise."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from jobs.options import Json, ModelName, Overrides, RayAddress, Storage, TrackingUri, session_of
from jobs.output import print_result
from pipelines.errors import UserError
from pipelines.progress import counted

_OPTIONS = {"sample.n": "--n", "sample.seed": "--seed", "sample.labels": "--labels"}
"""Fields of a spec for which there are options of its own."""
_DEFAULT_N = 64


def sample(
    model: ModelName,
    out: Annotated[str, typer.Option(help="Folder of the images, or s3://bucket/prefix.")],
    n: Annotated[int | None, typer.Option("--n", help="Number of images [default: 64].", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Image i is a function of model, settings, seed and i.")] = 0,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|data|I,J,...",
            help="Classes: every one in turn, as in --data, or these in turn [default: the spec's].",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Whose training images' classes `--labels data` matches.")
    ] = None,
    forms: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="png|npz|parquet", help="Write this beside the shards; may be repeated."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="I,J,...", help="Make these images again, as PNG files, and no others.")
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Draw how the first images come out of noise.")
    ] = False,
    ray: RayAddress = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Draw images in bulk. A rerun makes the missing ones only, a larger --n extends."""
    from jobs.live import kept_where_interrupted
    from pipelines.drawing import Settings
    from pipelines.models import find_model
    from pipelines.sample import Studio, draw_trajectory, other_forms, sample_images, sample_job, write_form
    from pipelines.sample.singles import MOST_STRIPS
    from pipelines.store import Place

    for form in forms or ():
        _check_form(form)
    wanted = None if images is None else _numbers("--images", images)
    with session_of(None, storage, tracking_uri, address=ray) as session:
        found = find_model(model, session.store, session.tracker, _overrides(overrides, labels), verb="sample")
        settings = Settings.of(found.spec.sample, seed, _class_counts(found, data))
        studio, place = Studio.of(found.spec.sample, session), Place.of(out)
        told: dict[str, Any]
        with kept_where_interrupted(session.progress):
            if wanted is None:
                n = n or _DEFAULT_N
                session.progress.start("sample", f"{counted(n, 'image')} of {found.origin}")
                samples = sample_job(found, settings, n, place, studio)
                told = {**asdict(samples), "files": {form: write_form(samples, form) for form in forms or ()}}
                for line in other_forms(samples):
                    session.progress.say(line)
                shown = f", some of them on {samples.sheet}" if samples.sheet else ""
                session.progress.finish("sample", f"{counted(n, 'image')}{shown}")
            else:
                for option, given in (("--n", n), ("--format", forms)):
                    if given:
                        warnings.warn(f"{option}: has no effect with --images", stacklevel=1)
                session.progress.start("sample", f"{counted(len(wanted), 'image')} of {found.origin} again")
                singles = sample_images(found, settings, wanted, place, studio)
                told = asdict(singles)
                session.progress.finish("sample", f"{counted(singles.n, 'image')}, made again")
            if trajectory:
                session.progress.start("trajectory", "drawing")
                shown_of = sorted(set(wanted)) if wanted else range(min(n or _DEFAULT_N, MOST_STRIPS))
                if len(shown_of) > MOST_STRIPS:
                    session.progress.say(f"--trajectory: of the images, the first {MOST_STRIPS} are shown")
                picture = draw_trajectory(found, settings, shown_of[:MOST_STRIPS], place, studio)
                told["trajectory"] = str(picture)
                session.progress.finish("trajectory", str(picture))
    print_result(as_json, told, lambda: _show(told))


def _show(told: dict[str, Any]) -> None:
    print(f"{told['out']}  {told['sha256']}")
    for file in [*told.get("files", {}).values(), *told.get("images", {}).values()]:
        print(file)


def _check_form(form: str) -> None:
    from pipelines.sample.forms import check_form

    check_form(form)


def _overrides(overrides: Sequence[str] | None, labels: str | None) -> list[str]:
    for override in overrides or ():
        for name in _fields(override):
            if (option := _OPTIONS.get(name)) is not None:
                raise UserError(f"--set {override}: {name} is said by {option} here")
    if labels is None:
        return list(overrides or ())
    value = labels if labels in ("uniform", "data") else str(_numbers("--labels", labels))
    return [*(overrides or ()), f"sample.labels={value}"]


def _fields(override: str) -> list[str]:
    """Of a spec, those that an override sets: one, or those of a section."""
    name = override.partition("=")[0]
    from pipelines.fields import apply_overrides

    value = apply_overrides({}, [override]).get(name)
    return [f"{name}.{field}" for field in value] if isinstance(value, dict) else [name]


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers, 0 or more, between commas."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise UserError(f"{option} {text}: give whole numbers between commas, as in 0,17")
    return [int(word) for word in words]


def _class_counts(model: Any, data: str | None) -> Sequence[int] | None:
    """Images of each class in the training split of a dataset."""
    from pipelines.data.manifest import Dataset
    from pipelines.store import Place

    if model.spec.sample.labels != "data":
        if data is not None:
            raise UserError(f"--data {data}: it is for --labels data")
        return None
    if data is None:
        raise UserError("--labels data: name the dataset whose classes are matched by --data")
    dataset = Dataset.open(Place.of(data))
    if len(dataset.classes) != model.spec.model.classes:
        raise UserError(
            f"--data {data}: it has {len(dataset.classes)} classes, the model knows {model.spec.model.classes}"
        )
    return dataset.class_counts
