"""Ingest: a source of images becomes a dataset of WebDataset shards.

    scan     decode every image once: its content's hash, or the error that stops all before any shard is written
    plan     which image goes into which shard, and the dataset's digest: a pure function of the scan
    write    one shard and its index: a pure function of (source, recipe, plan), so that any process may do it
    commit   contact sheet, table of shards and, last, the card

Scan and write run over chunks of the source, as Ray tasks where there is more than a little to do. Each leaves a
record, and an ingest that was killed goes on with what has none. The same images and the same recipe give the same
bytes, whatever ran where and however often it was killed; without the card, nothing of it is taken for a dataset.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.cluster import Cluster
from pipelines.data.card import commit, contact_sheet
from pipelines.data.manifest import (
    BEGUN,
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
from pipelines.data.sources import Source, open_source
from pipelines.data.work import over_chunks
from pipelines.data.write import DONE, ShardRecord, write_shard, written
from pipelines.errors import UserError
from pipelines.store import Place, check_writable, identity

Progress = Callable[[int, int], None]

HELD_OUT_SHARE = 0.2
"""Share of the images that are held out where neither the caller nor the source says."""

_CHUNK = 1000
"""Images of a chunk of the scan."""
_SCANNED = "scan"
"""Folder of the scan's records, while the ingest lasts."""
_LOCK = "lock"
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
    where it holds another one that is refused. UserError names what is wrong with the source or the recipe, and then
    nothing is left in `out`.
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
    if held_out is not None and own_split(source):
        warnings.warn(f"data.held_out: has no effect, for {source.name} has a split of its own", stacklevel=2)
    return _Ingest(source, out, recipe, cluster, workers, progress or (lambda done, total: None)).run()


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

    def run(self) -> Dataset:
        if (self.out / CARD).exists():
            return self._same_dataset(plan_shards(self.source, self._scan(None), self.recipe))
        existed = self.out.exists()
        check_writable(self.out)
        with alone(self.out):
            self._begin()
            try:
                scan = self._scan(self.out / _SCANNED)
                plan = plan_shards(self.source, scan, self.recipe)
            except UserError:
                self._withdraw(existed)
                raise
            _tell(self.source, plan)
            self._clear(plan)
            dataset = self._commit(plan, self._write(plan))
            self._clean()
        return dataset

    def _scan(self, notes: Place | None) -> Scan:
        """What every image is; chunks noted by an earlier attempt at the same source and recipe are taken over."""
        count = len(self.source)
        chunks = [(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
        parts: dict[tuple[int, int], Scan] = {}
        if notes is not None:
            notes = notes / self._identity()[:16]
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
        records = {shard.name: record for shard in plan.shards if (record := self._written(shard)) is not None}
        missing = [shard for shard in plan.shards if shard.name not in records]
        # Images that were dropped as duplicates are not visited again.
        done = self.total - sum(len(shard.items) for shard in missing)
        self.report(done, self.total)
        for _, record in self.over(functools.partial(write_shard, self.source, self.recipe, self.out), missing):
            records[record.name] = record
            done += record.samples
            self.report(done, self.total)
        return [records[shard.name] for shard in plan.shards]

    def _written(self, shard: Any) -> ShardRecord | None:
        record = written(self.out, shard)
        if record is None or (self.out / shard.name).size() != record.bytes or not (self.out / shard.index).exists():
            return None
        return record

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

    def _same_dataset(self, plan: Plan) -> Dataset:
        found = Dataset.open(self.out)
        if found.digest != plan.digest:
            raise UserError(f"{self.out}: another dataset is here (digest {found.digest[:12]}); name another folder")
        self._clean()
        return found

    def _identity(self) -> str:
        """Of source and recipe as they are now."""
        source = {"kind": self.source.kind, "name": self.source.name, "fingerprint": self.source.fingerprint()}
        return identity({"format": FORMAT, "source": source, "recipe": self.recipe.fields()})

    def _begin(self) -> None:
        """Mark the folder as ours: what is in it without the mark is not."""
        left = [name for name in self.out.list() if _OURS.fullmatch(name)]
        if left and not (self.out / BEGUN).exists():
            raise UserError(f"{self.out}: {left[0]} is there and not from an unfinished ingest; name an empty folder")
        (self.out / BEGUN).write_json({"format": FORMAT})

    def _clear(self, plan: Plan) -> None:
        """Remove shards of another, unfinished ingest: a reader of train-*.tar would take them for ours."""
        planned = {name for shard in plan.shards for name in (shard.name, shard.index)}
        for name in self.out.list():
            if _OURS.fullmatch(name) and name not in planned:
                (self.out / name).delete()

    def _clean(self) -> None:
        """Remove the records: the dataset is there."""
        for name in (_SCANNED, DONE):
            (self.out / name).remove()

    def _withdraw(self, existed: bool) -> None:
        """Leave nothing of an ingest that cannot be."""
        self._clean()
        for name in self.out.list():
            if _OURS.fullmatch(name) or name == BEGUN:
                (self.out / name).delete()
        if not existed:
            self.out.remove()


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
    warnings.warn(f"{what} ({hint})", stacklevel=4)


@contextlib.contextmanager
def alone(out: Place) -> Iterator[None]:
    """Hold a folder that is being made a dataset, where it can be held: on S3 two who do the same write the same."""
    if not out.is_local:
        yield
        return
    lock = out / _LOCK
    with lock.lock(f"the dataset in {out}"):
        try:
            yield
        finally:
            # Whoever waits for nothing, as we do not wait either, finds a finished dataset or a new lock.
            lock.delete()
