"""Tars that are there already become a dataset where they lie: `ddpm data index`. None of them is changed.

Each tar is looked at as a task (`index_tar`), which leaves its indices and a record; an indexing that was killed goes
on with the tars that have none. Then, as in an ingest: contact sheet, table of shards and, last, the card.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.cluster import Cluster
from pipelines.data.card import SHEET_IMAGES, commit, sheet_of
from pipelines.data.headers import open_whole
from pipelines.data.index_tar import INDEX, Found, Tar, index_tar
from pipelines.data.ingest import HELD_OUT_SHARE
from pipelines.data.manifest import (
    BESIDE,
    CARD,
    CARD_PAGE,
    FORMAT,
    INDEX_COLUMNS,
    SHARDS,
    SHEET,
    SPLITS,
    Dataset,
    dataset_digest,
    read_table,
)
from pipelines.data.plan import Duplicates
from pipelines.data.reader import Reader
from pipelines.data.recipe import Recipe, Resize
from pipelines.data.site import RECORDS, Site
from pipelines.data.sources import NO_LABEL
from pipelines.data.sources.paths import own_split, split_of_file, warn_of_labels
from pipelines.data.sources.tars import is_tar
from pipelines.data.work import over_chunks
from pipelines.data.write import ShardRecord, whole_numbers
from pipelines.errors import UserError
from pipelines.progress import counted
from pipelines.store import Place, identity, sha256

_RECORDED = {field.name for field in fields(ShardRecord)}


def index(
    tars: Place,
    out: Place | None = None,
    *,
    image_size: int,
    channels: int,
    held_out: float | None = None,
    resize: Resize = "auto",
    cluster: Cluster | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Make a dataset of all tars below a folder or an S3 prefix, in `out` or beside them, and open it.

    Pictures stay as they are stored, and are brought to size and channels as they are read. The split is in the names
    of the tars or of their folders; otherwise `held_out` (by default 0.2) of the images are held out, by a hash of
    their content. With a cluster, the tars are shared out as `over_chunks` says; `progress(done, total)` counts them.
    Where `out` holds the dataset of these very tars (by name, size and sha256) and settings nothing is done. UserError
    where there is no tar, no picture, a damaged one, or something else in `out`.
    """
    share = HELD_OUT_SHARE if held_out is None else held_out
    recipe = Recipe(image_size=image_size, channels=channels, held_out=share, shard_images=1, resize=resize)
    names = [name for name in tars.find("") if is_tar(name)]
    if not names:
        raise UserError(f"{tars}: there is no .tar below; name a folder of tars, or an s3://bucket/prefix of them")
    for name in names:
        if "\\" in name or ":" in name:
            raise UserError(f"{tars / name}: a shard's name cannot have a backslash or a colon; rename it")
    splits = own_split({name: split_of_file(name) for name in names}) or {}
    if splits and held_out is not None:
        warnings.warn(f"data.held_out: has no effect, for {tars} has a split of its own", stacklevel=2)
        recipe = replace(recipe, held_out=HELD_OUT_SHARE)
    out = out or tars
    work = _Index(tars, out, recipe, splits, progress or (lambda done, total: None))
    over = functools.partial(over_chunks, cluster=cluster, workers=workers)
    return work.site.dataset(lambda: work.same_dataset(names), lambda: work.make(names, over))


class _Index:
    """One call's settings, which every step needs."""

    def __init__(
        self,
        tars: Place,
        out: Place,
        recipe: Recipe,
        splits: Mapping[str, str],
        report: Callable[[int, int], None],
    ) -> None:
        self.tars, self.out, self.recipe, self.splits, self.report = tars, out, recipe, splits, report
        told = {"format": FORMAT, "tars": str(tars), **recipe.fields()}
        self.site = Site(out, "data index", str(tars), identity(told), self._ours)

    def make(self, names: Sequence[str], over: Callable[..., Iterator[tuple[int, list[Found]]]]) -> Dataset:
        """Look at each tar that no earlier attempt has looked at, and commit what was found."""
        self.site.claim(f"{INDEX}/{name[:-4]}.{split}.parquet" for name in names for split in SPLITS)
        found = self._look(names, over)
        records, classes = _records([one for name in names for one in found[name]])
        if not any(record.split == SPLITS[0] for record in records):
            raise UserError(
                f"{self.tars}: no picture to train on in {counted(len(names), 'tar')}; png, jpg, webp and npy are read"
            )
        empty = [name for name in names if not found[name]]
        if empty:
            warnings.warn(
                f"{self.tars}: without a picture: {counted(len(empty), 'tar')}, {empty[0]} for one", stacklevel=4
            )
        warn_of_labels(sum(one.unread_labels for name in names for one in found[name]), self.tars)
        digest, copies, straddling = self._digest(records)
        if copies:
            also = f", {straddling:,} of them in both splits, so that scores flatter the model" if straddling else ""
            warnings.warn(f"{self.tars}: exact copies of other images: {copies:,}{also}", stacklevel=4)
        self.site.claim(record.index for record in records)  # and none of what an earlier attempt found
        return commit(
            self.out,
            records,
            self.recipe,
            digest=digest,
            classes=classes,
            source={"kind": "tars", "name": str(self.tars)},
            found={
                "shard_images": None,  # they are cut as they are
                "own_split": bool(self.splits),
                "without_pictures": empty,
                "duplicates": asdict(Duplicates(copies, between_splits=straddling)),
            },
            sheet=lambda split: _sheet(Reader(split, cache_bytes=0)),
            decode="fit",
            tars=BESIDE if self.out == self.tars else str(self.tars),
        )

    def same_dataset(self, names: Sequence[str]) -> Dataset:
        """The dataset that is there, if it is the one asked for."""
        there = Dataset.open(self.out)
        columns = (there.table[name].to_pylist() for name in ("name", "bytes", "sha256"))
        tars = {name: (size, digest) for name, size, digest in zip(*columns, strict=True)}
        recipe = {name: value for name, value in self.recipe.fields().items() if name != "shard_images"}
        beside = self.out == self.tars and there.card["tars"] == BESIDE  # wherever both have been moved to
        if not beside and there.card["source"] != {"kind": "tars", "name": str(self.tars)}:
            raise UserError(f"{self.out}: a dataset of other images is here; give --out to make one elsewhere")
        other = next((name for name, value in recipe.items() if there.card.get(name) != value), None)
        if other is not None:
            raise UserError(
                f"{self.out}: a dataset with other {other} is here; give --out to make one elsewhere, or delete its "
                f"{CARD} to index anew"
            )
        known = {*tars, *there.card["without_pictures"]}
        gone = sorted(known.difference(names))
        others = (name for name in names if not self._is_as_it_was(name, known, tars))
        changed = next(itertools.chain(others, gone), None)
        if changed is not None:
            raise UserError(
                f"{self.out}: {changed} is not as it was when this dataset was made; delete its {CARD} to index anew"
            )
        return there

    def _is_as_it_was(self, name: str, known: Collection[str], tars: Mapping[str, tuple[int, bytes]]) -> bool:
        """Whether a tar is that of the dataset that is there. It is read whole: tars are padded, and changed labels,
        say, leave their size as it was.
        """
        if name not in tars:
            return name in known
        place, (size, digest) = self.tars / name, tars[name]
        return place.size() == size and open_whole(place, size)[1] == digest

    def _ours(self) -> Iterator[str]:
        """Files in `out` that look like those of an index."""
        yield from {SHARDS, SHEET, CARD_PAGE}.intersection(self.out.list())
        yield from (f"{INDEX}/{name}" for name in (self.out / INDEX).find(".parquet"))

    def _look(
        self, names: Sequence[str], over: Callable[..., Iterator[tuple[int, list[Found]]]]
    ) -> dict[str, list[Found]]:
        """What is in each tar; those that an earlier attempt has looked at are not looked at again."""
        tars = [
            Tar(name, self.splits.get(name), f"{(self.tars / name).size()}/{(self.tars / name).changed()}")
            for name in names
        ]
        found = {tar.name: known for tar in tars if (known := _recorded(self.out, self.recipe, tar)) is not None}
        missing = [tar for tar in tars if tar.name not in found]
        self.report(len(found), len(tars))
        work = functools.partial(_index_and_record, self.tars, self.out, self.recipe)
        for place, result in over(work, missing):
            found[missing[place].name] = result
            self.report(len(found), len(tars))
        return found

    def _digest(self, records: Sequence[ShardRecord]) -> tuple[str, int, int]:
        """The dataset's digest, the images beyond the first of each content, and the contents of both splits."""
        sizes = {split: [r.samples for r in records if r.split == split] for split in SPLITS}
        contents: dict[str, list[NDArray[np.bytes_]]] = {split: [] for split in SPLITS}

        def samples() -> Iterator[tuple[bytes, int]]:
            for record in records:
                place = self.out / record.index
                table = read_table(place.read(), INDEX_COLUMNS, place)
                found = table["content"].to_pylist()
                contents[record.split].append(np.array(found, dtype="S32"))  # 32 bytes an image, not an object
                yield from zip(found, table["label"].to_pylist(), strict=True)

        digest = dataset_digest(sizes, samples())
        train, held_out = (np.unique(np.concatenate(contents[split] or [np.empty(0, "S32")])) for split in SPLITS)
        both = len(np.intersect1d(train, held_out, assume_unique=True))
        return digest, sum(map(sum, sizes.values())) - (len(train) + len(held_out) - both), both


def _index_and_record(tars: Place, out: Place, recipe: Recipe, tar: Tar) -> list[Found]:
    record = _record(out, recipe, tar)
    record.delete()  # what it tells of is about to be written over
    found = index_tar(tars, out, recipe, tar)
    record.write_json([asdict(one) for one in found])
    return found


def _recorded(out: Place, recipe: Recipe, tar: Tar) -> list[Found] | None:
    """What an earlier attempt has found in a tar, if the indices are still those that it wrote."""
    try:
        told: list[dict[str, Any]] = _record(out, recipe, tar).read_json()
    except FileNotFoundError:
        return None
    found = []
    for record in told:
        for name in ("labels", "names"):
            record[name] = whole_numbers(record[name])
        for name in ("pixel_sum", "pixel_square_sum"):
            record[name] = tuple(record[name])
        found.append(Found(**record))
    try:
        return found if all(sha256((out / one.index).read()) == one.index_sha256 for one in found) else None
    except FileNotFoundError:
        return None


def _record(out: Place, recipe: Recipe, tar: Tar) -> Place:
    return out / RECORDS / "indexed" / f"{identity({'format': FORMAT, **asdict(tar), **recipe.fields()})[:24]}.json"


def _records(found: Sequence[Found]) -> tuple[list[ShardRecord], tuple[str, ...]]:
    """Rows of the table of shards, split by split, and the names of the classes."""
    names: dict[int, str] = {}
    for one in found:
        for label, name in one.names.items():
            if names.setdefault(label, name) != name:
                raise UserError(f"{one.tar}: label {label} is called {name} here, {names[label]} before")
    largest = max((label for one in found for label in one.labels), default=NO_LABEL)
    classes = tuple(names.get(label, str(label)) for label in range(largest + 1))
    records = []
    for one in sorted(found, key=lambda one: (SPLITS.index(one.split), one.tar)):
        same = {name: value for name, value in asdict(one).items() if name in _RECORDED}
        records.append(ShardRecord(name=one.tar, **same))
    return records, classes


def _sheet(reader: Reader) -> bytes:
    """The contact sheet: images evenly spaced through the split."""
    n = len(reader.split)
    positions = np.arange(min(n, SHEET_IMAGES)) * n // min(n, SHEET_IMAGES)
    ends = np.cumsum(reader.split.shard_sizes)
    shards = np.searchsorted(ends, positions, side="right")
    starts = ends - np.asarray(reader.split.shard_sizes)
    return sheet_of(list(reader.read(shards, positions - starts[shards])[0]))
