"""Ingest: a source of images becomes a dataset of WebDataset shards.

    scan     decode every image once: its content's hash, or the error that stops all before any shard is written
    plan     which image goes into which shard, and the dataset's digest: a pure function of the scan
    write    one shard and its index: a pure function of (source, recipe, plan), so that any process may do it
    commit   contact sheet, table of shards and, last, the card

Scan and write run over chunks of the source, on Ray where there is more than a little to do. Each leaves a record, and
an ingest that was killed goes on with what has none. The same images and the same recipe give the same
bytes, whatever ran where and however often it was killed; without the card, nothing of it is taken for a dataset.
"""

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.cluster import Cluster
from pipelines.data.card import commit, contact_sheet
from pipelines.data.manifest import (
    CARD,
    CARD_PAGE,
    FORMAT,
    SHARDS,
    SHEET,
    SPLITS,
    Dataset,
    content_hash,
    read_table,
    write_table,
)
from pipelines.data.plan import TRAIN, Plan, Scan, own_split, plan_shards
from pipelines.data.recipe import Recipe, Resize
from pipelines.data.site import Site
from pipelines.data.sources import Source, open_source
from pipelines.data.work import over_chunks
from pipelines.data.write import ShardRecord, write_shard
from pipelines.errors import UserError
from pipelines.store import Place, identity

Progress = Callable[[int, int], None]

HELD_OUT_SHARE = 0.2
"""Share of the images that are held out where neither the caller nor the source says."""

_CHUNK = 1000
"""Images of a chunk of the scan."""
_SCAN_COLUMNS = {"content": pa.binary(32), "width": pa.int64(), "height": pa.int64()}


def ingest(
    source: str | Source,
    out: Place,
    *,
    image_size: int,
    channels: int,
    held_out: float | None = None,
    shard_images: int = 1000,
    resize: Resize = "auto",
    drop_duplicates: bool = False,
    cluster: Cluster | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Make the dataset of a source in folder `out` and open it.

    With a cluster, the work is shared out as `over_chunks` says. A source that has a split of its own keeps it,
    whatever `held_out` says (by default 0.2), with a warning where it is said. Every image is visited twice (scan,
    write): `progress(done, total)` counts visits. Where `out` already holds this very dataset nothing is written;
    where it holds another one, or anything else under a name that a dataset has, that is refused. UserError names
    what is wrong with the source or the recipe. What shows before the first shard is begun leaves nothing new in
    `out`; later, or where an earlier attempt was stopped, what is finished stays for the next one.
    """
    recipe = Recipe(
        image_size=image_size,
        channels=channels,
        held_out=HELD_OUT_SHARE if held_out is None else held_out,
        shard_images=shard_images,
        resize=resize,
        drop_duplicates=drop_duplicates,
    )
    source = open_source(source) if isinstance(source, str) else source
    if source.kind == "folder" and all((Path(source.name) / name).is_file() for name in (CARD, SHARDS)):
        raise UserError(f"data.source: {source.name} is a dataset already, which needs no ingest; give its images")
    if Path(source.name).is_dir() and source.kind != "digits" and out.is_within(source.name):
        raise UserError(f"{out} lies inside data.source, whose images are read; name a folder outside of it")
    if out == Place.of(Path(source.name).parent) and _OURS.fullmatch(Path(source.name).name):
        raise UserError(f"{out}: data.source lies in it under a name that a dataset has; name another folder")
    if held_out is not None and own_split(source):
        warnings.warn(f"data.held_out: has no effect, for {source.name} has a split of its own", stacklevel=2)
        recipe = replace(recipe, held_out=HELD_OUT_SHARE)
    work = _Ingest(source, out, recipe, cluster, workers, progress or (lambda done, total: None))
    return work.site.dataset(work.known, work.make)


class _Ingest:
    """One call's settings, which every step needs."""

    def __init__(
        self,
        source: Source,
        out: Place,
        recipe: Recipe,
        cluster: Cluster | None,
        workers: int | None,
        report: Progress,
    ) -> None:
        self.source, self.out, self.recipe = source, out, recipe
        self.over = functools.partial(over_chunks, cluster=cluster, workers=workers)
        self.report = report
        self.total = 2 * len(source)
        told = {"kind": source.kind, "name": source.name, "fingerprint": source.fingerprint()}
        self.identity = identity({"format": FORMAT, "source": told, "recipe": recipe.fields()})
        self.site = Site(out, "ingest", source.name, self.identity, lambda: filter(_OURS.fullmatch, out.list()))

    def known(self) -> Dataset:
        """The dataset that is there, if it is the one asked for."""
        found = Dataset.open(self.out)
        asked = {**self.recipe.fields(), "classes": list(self.source.classes)}
        differs = next((f"other {name}" for name, value in asked.items() if found.card.get(name) != value), None)
        if differs is None and found.digest != plan_shards(self.source, self._scan(None), self.recipe).digest:
            differs = f"digest {found.digest[:12]}"
        if differs is not None:
            raise UserError(f"{self.out}: another dataset is here ({differs}); name another folder")
        return found

    def make(self) -> Dataset:
        """Scan, plan, write and commit, going on with what an earlier attempt has finished of it."""
        plan = plan_shards(self.source, self._scan(self.site.records / "scan"), self.recipe)
        _tell(self.source, plan)
        self.site.claim(name for shard in plan.shards for name in (shard.name, shard.index))
        records = self._write(plan)
        self.site.confirm()
        return self._commit(plan, records)

    def _scan(self, notes: Place | None) -> Scan:
        """What every image is; chunks noted by an earlier attempt at the same source and recipe are taken over."""
        count = len(self.source)
        chunks = [(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
        parts: dict[tuple[int, int], Scan] = {}
        if notes is not None:
            notes = notes / self.identity[:16]
            parts = {chunk: part for chunk in chunks if (part := _noted(notes, chunk)) is not None}
        done = sum(last - first for first, last in parts)
        self.report(done, self.total)
        missing = [chunk for chunk in chunks if chunk not in parts]
        for index, part in self.over(functools.partial(_scan_chunk, self.source, self.recipe, notes), missing):
            parts[missing[index]] = part
            done += len(part.contents)
            self.report(done, self.total)
        ordered = [parts[chunk] for chunk in chunks]
        return Scan(np.concatenate([p.contents for p in ordered]), np.concatenate([p.sizes for p in ordered]))

    def _write(self, plan: Plan) -> list[ShardRecord]:
        records: dict[int, ShardRecord] = {}
        # Images that were dropped as duplicates are not visited again.
        done = self.total - sum(len(shard.items) for shard in plan.shards)
        self.report(done, self.total)
        for place, record in self.over(functools.partial(write_shard, self.source, self.recipe, self.out), plan.shards):
            records[place] = record
            done += record.samples
            self.report(done, self.total)
        return [records[place] for place in range(len(plan.shards))]

    def _commit(self, plan: Plan, records: list[ShardRecord]) -> Dataset:
        shown = [item for shard in plan.shards if shard.split == TRAIN for item in shard.items]
        sheet = contact_sheet(len(shown), lambda place: self.recipe.pixels(self.source.load(shown[place])))
        return commit(
            self.out,
            records,
            self.recipe,
            digest=plan.digest,
            classes=self.source.classes,
            source={"kind": self.source.kind, "name": self.source.name},
            found={
                "own_split": own_split(self.source),
                "source_sizes": plan.source_sizes,
                "duplicates": asdict(plan.duplicates),
            },
            sheet=sheet,
        )


_OURS = re.compile(rf"({'|'.join(SPLITS)})-\d{{6,}}\.(tar|parquet)|{SHARDS}|{SHEET}|{CARD_PAGE}")


def _scan_chunk(source: Source, recipe: Recipe, notes: Place | None, chunk: tuple[int, int]) -> Scan:
    """Content and size of the images of a chunk, noted where `notes` says."""
    contents, sizes = [], []
    for index in range(*chunk):
        image = source.load(index)
        sizes.append(image.size)
        contents.append(content_hash(recipe.pixels(image)))
    if notes is not None:
        widths, heights = zip(*sizes, strict=True)
        rows = {"content": contents, "width": widths, "height": heights}
        _note(notes, chunk).write(write_table(_SCAN_COLUMNS, rows))
    return _scan_of(contents, sizes)


def _noted(notes: Place, chunk: tuple[int, int]) -> Scan | None:
    place = _note(notes, chunk)
    try:
        table = read_table(place.read(), _SCAN_COLUMNS, place)
    except FileNotFoundError:
        return None
    sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
    return _scan_of(table["content"].to_pylist(), sizes)


def _note(notes: Place, chunk: tuple[int, int]) -> Place:
    return notes / f"{chunk[0]:012d}-{chunk[1]:012d}.parquet"


def _scan_of(contents: list[bytes], sizes: list[tuple[int, int]]) -> Scan:
    hashes = np.frombuffer(b"".join(contents), dtype=np.uint8).reshape(-1, 32)
    return Scan(hashes, np.asarray(sizes, dtype=np.int64).reshape(-1, 2))


def _tell(source: Source, plan: Plan) -> None:
    """Warn of copies: they count twice in training, and in both splits they flatter the scores."""
    found = plan.duplicates
    if not found.copies:
        return
    one, other = found.examples[0]
    what = f"data.source: exact copies of other images: {found.copies:,}, {other} of {one} for one"
    if found.labels_differ:
        what += f"; {found.labels_differ:,} pictures come with more than one label"
    if found.between_splits and not found.dropped:
        what += f"; {found.between_splits:,} are in both splits, so that scores flatter the model"
    hint = "dropped, as asked" if found.dropped else "data.drop_duplicates would drop them"
    warnings.warn(f"{what} ({hint})", stacklevel=5)
