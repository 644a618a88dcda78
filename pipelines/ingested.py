"""The first step of every spec: its dataset, ingested into the store, or made before and used as it is."""

import os
import warnings
from pathlib import Path
from typing import Any

from pipelines.data.ingest import ingest
from pipelines.data.manifest import CARD, FORMAT, SHARDS, Dataset
from pipelines.data.sources import open_source
from pipelines.errors import UserError
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.steps import Done, Step, Steps
from pipelines.store import Place, identity

_RECIPE = ("image_size", "channels", "held_out", "shard_images", "resize", "drop_duplicates")


def ingested(spec: Spec, session: Session, steps: Steps) -> tuple[Dataset, Done]:
    """A spec's dataset, made where it is not there yet."""
    done = steps.run(ingest_step(spec, session))
    dataset = Dataset.open(_place(done.outputs["dataset"], session))
    if spec.data.cache is not None and dataset.split("train").tars.is_local:
        warnings.warn("data.cache: has no effect, for the shards lie on this host's file system", stacklevel=2)
    return dataset, done


def ingest_step(spec: Spec, session: Session) -> Step:
    """Images become shards. UserError where `data.source` is neither images nor a dataset as the spec has it."""
    if (place := _made_before(spec.data.source)) is not None:
        return _open_step(spec, Dataset.open(place))
    source = open_source(spec.data.source)
    recipe = {name: getattr(spec.data, name) for name in _RECIPE}
    fingerprint = source.fingerprint()
    inputs = {"kind": source.kind, "name": source.name, "fingerprint": fingerprint, "format": FORMAT, **recipe}
    folder = f"datasets/{spec.name}-{identity(inputs)[:12]}"

    def work() -> dict[str, Any]:
        def report(done: int, total: int) -> None:
            session.progress.advance(done // 2, total // 2, "images")

        said = recipe if "held_out" in spec.data.model_fields_set else {**recipe, "held_out": None}
        dataset = ingest(
            source,
            session.store / folder,
            cluster=session.cluster,
            workers=spec.data.workers,
            progress=report,
            **said,
        )
        return {"dataset": folder, **_told(dataset)}

    return Step(
        name="ingest",
        version=1,
        inputs=inputs,
        work=work,
        needs=lambda outputs: (session.store / outputs["dataset"] / CARD).exists(),
        doing=f"{spec.data.source} into WebDataset shards",
    )


def _open_step(spec: Spec, dataset: Dataset) -> Step:
    """A dataset that is there: nothing is to be done but to see that it is what the spec says."""
    for field, has in (("image_size", dataset.image_size), ("channels", dataset.channels)):
        if (said := getattr(spec.data, field)) != has:
            raise UserError(f"data.{field}: {said}, but the dataset {dataset.place} has {has}; set it so")
    fields = type(spec.data).model_fields
    for field in ("resize", "held_out", "drop_duplicates", "shard_images", "workers"):
        if getattr(spec.data, field) != fields[field].default:
            warnings.warn(f"data.{field}: has no effect, for {dataset.place} was made before", stacklevel=3)
    return Step(
        name="ingest",
        version=1,
        inputs={"dataset": str(dataset.place), "digest": dataset.digest},
        work=lambda: {"dataset": str(dataset.place), **_told(dataset)},
        doing=f"{dataset.place}, made before",
    )


def _made_before(source: str) -> Place | None:
    """The place of a dataset; None where the source is to be ingested."""
    if "://" in source:
        return Place.of(source)
    folder = os.path.expanduser(source)
    there = source != "digits" and all(os.path.isfile(os.path.join(folder, name)) for name in (CARD, SHARDS))
    return Place.of(folder) if there else None


def _place(text: str, session: Session) -> Place:
    """Of a dataset by a step's outputs: below the store, where it is relative."""
    return Place.of(text) if "://" in text or Path(text).is_absolute() else session.store / text


def _told(dataset: Dataset) -> dict[str, Any]:
    counts = {split: len(dataset.split(split)) for split in ("train", "held-out")}
    summary = f"{counts['train']:,} images to train on, {counts['held-out']:,} held out"
    return {"digest": dataset.digest, **counts, "summary": summary}
