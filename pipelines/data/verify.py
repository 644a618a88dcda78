"""Everything that is wrong with a dataset, found in one pass: `ddpm data verify`."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.data.check import Finding, ShardCheck, check_shard
from pipelines.data.manifest import CARD, SHARDS, SPLITS, Dataset, Shard, dataset_digest
from pipelines.data.work import over_chunks
from pipelines.progress import Progress
from pipelines.store import DamageError, Place

MapShards = Callable[[Callable[[Shard], ShardCheck], Sequence[Shard]], Iterable[tuple[int, ShardCheck]]]
"""Does a work, which may be pickled, on each of the shards, and yields (place in the list, result) in any order."""

_OURS = re.compile(rf"({'|'.join(SPLITS)}|samples)-\d{{6,}}(-first-\d+)?\.(tar|parquet)")
_CLOSE = 1e-9
"""Two ways of adding up whole numbers that mean and deviation may differ by."""


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what was found."""

    place: str
    digest: str | None
    """The card's; None where it cannot be read."""
    shards: int
    images: int
    """Images that were decoded."""
    bytes: int
    """Bytes of the tars."""
    findings: tuple[Finding, ...]


def verify(place: Place, *, map_shards: MapShards = over_chunks, progress: Progress | None = None) -> Verification:
    """Look at every byte of a dataset's tars and indices, and whether table and card agree with them.

    UserError where there is no dataset; all damage is in the result. `progress` is told the images. Beside one shard a
    process, and what is done before its turn, memory holds 40 bytes an image of the shards that are done.
    """
    try:
        dataset = Dataset.open(place)
    except DamageError as error:
        return Verification(str(place), None, 0, 0, 0, (_of_opening(place, error),))
    if findings := tuple(_check_card(dataset)):  # no image can be looked at by a card that is not clear about them
        return Verification(str(place), dataset.digest, 0, 0, 0, findings)
    return _Pass(dataset, map_shards, progress or Progress()).run()


class _Pass:
    """One pass over a dataset's shards, and what adds up on the way."""

    def __init__(self, dataset: Dataset, map_shards: MapShards, progress: Progress) -> None:
        self.dataset, self.map_shards, self.progress = dataset, map_shards, progress
        self.splits = {name: dataset.split(name) for name in SPLITS}
        self.shards = [(name, shard) for name, split in self.splits.items() for shard in split.shards]
        self.findings: list[Finding] = []
        self.images = self.bytes = 0
        self.labels = {name: np.zeros(len(dataset.classes) + 1, dtype=np.int64) for name in SPLITS}
        """Images of each class, those without one at the end."""
        self.pixels = np.zeros((dataset.channels, 256), dtype=np.int64)
        self.whole = dict.fromkeys(SPLITS, True)

    def run(self) -> Verification:
        sizes = {name: split.shard_sizes for name, split in self.splits.items()}
        self.findings += _check_files(self.dataset)
        digest = dataset_digest(sizes, self._samples())
        card, whole = self.dataset.place / CARD, all(self.whole.values())
        for name, split in self.splits.items():
            self._check_counts(name, len(split), len(split.shard_sizes))
        if self.pixels.any():
            if self.whole["train"]:
                self._check_moments()
        else:  # pictures that are brought to the size as they are read
            self._check_moments_are_shares()
        if whole and digest != self.dataset.digest:
            self._say(card, f"has the digest {self.dataset.digest}, the images as they are have {digest}")
        # Two rows of the table can be about one tar: what is wrong with it as a whole was found twice.
        findings = tuple(dict.fromkeys(self.findings))
        place, shards = str(self.dataset.place), len(self.shards)
        return Verification(place, self.dataset.digest, shards, self.images, self.bytes, findings)

    def _say(self, file: Place, what: str) -> None:
        self.findings.append(Finding(str(file), None, what))

    def _samples(self) -> Iterator[tuple[bytes, int]]:
        """Content and label of every image in the dataset's order, as the shards are looked at."""
        # Without the table of shards, which would travel with every task.
        work = functools.partial(check_shard, replace(self.dataset, table=self.dataset.table.slice(0, 0)))
        shards = [shard for _, shard in self.shards]
        early: dict[int, ShardCheck] = {}
        turn, done, total = 0, 0, sum(shard.samples for shard in shards)
        for number, check in self.map_shards(work, shards):
            done += shards[number].samples
            self.progress.advance(done, total, "images")
            early[number] = check
            while (checked := early.pop(turn, None)) is not None:
                self._add(self.shards[turn][0], checked)
                yield from zip(map(bytes, checked.contents), checked.labels.tolist(), strict=True)
                turn += 1

    def _add(self, split: str, check: ShardCheck) -> None:
        self.findings += check.findings
        self.images += check.images
        self.bytes += check.bytes
        self.whole[split] &= check.whole
        if check.whole:
            # A label beyond the classes was found, and is no class's.
            known = check.labels[check.labels < len(self.dataset.classes)]
            self.labels[split] += np.bincount(known % len(self.labels[split]), minlength=len(self.labels[split]))
        if split == "train":
            self.pixels += check.pixels

    def _check_counts(self, split: str, samples: int, shards: int) -> None:
        counts: dict[str, Any] = {"samples": samples, "shards": shards}
        if self.whole[split]:
            *per_class, unlabelled = self.labels[split].tolist()
            counts |= {"per_class": per_class, "unlabelled": unlabelled}
        said = self.dataset.card["splits"]
        said = said.get(split) if isinstance(said, dict) else None
        for name, found in counts.items():
            told = said.get(name) if isinstance(said, dict) else None
            if told != found:
                what = f"says {told} {name} of {split}, the table of shards and the indices have {found}"
                self._say(self.dataset.place / CARD, what)

    def _check_moments_are_shares(self) -> None:
        for name in ("mean", "std"):
            told, channels = self.dataset.card[name], self.dataset.channels
            numbers = isinstance(told, list) and all(type(value) in (int, float) and 0 <= value <= 1 for value in told)
            if not numbers or len(told) != channels:
                self._say(self.dataset.place / CARD, f"says {name} {told}, which is not a share of white a channel")

    def _check_moments(self) -> None:
        """Mean and standard deviation of the training pixels, of 0 to 1."""
        counts, values = self.pixels.sum(axis=1), np.arange(256) / 255
        mean = self.pixels @ values / counts
        deviation = np.sqrt((self.pixels * (values - mean[:, None]) ** 2).sum(axis=1) / counts)
        for name, found in (("mean", mean), ("std", deviation)):
            told = self.dataset.card[name]
            try:
                agrees = np.shape(told) == found.shape and bool(np.allclose(told, found, rtol=0, atol=_CLOSE))
            except (TypeError, ValueError):
                agrees = False
            if not agrees:
                self._say(self.dataset.place / CARD, f"says {name} {told}, the training images have {found.tolist()}")


def _check_card(dataset: Dataset) -> Iterator[Finding]:
    """The fields that say what an image of the dataset is."""
    card, fields = str(dataset.place / CARD), dataset.card
    size, classes = fields["image_size"], fields["classes"]
    if type(size) is not int or size < 1:
        yield Finding(card, None, f"says image_size {size!r}, which is no size in pixels")
    if fields["channels"] not in (1, 3):
        yield Finding(card, None, f"says channels {fields['channels']!r}, neither 1 nor 3")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        yield Finding(card, None, "has classes that are not a list of names")
    if not isinstance(fields["tars"], str | None):
        yield Finding(card, None, f"says that the tars are at {fields['tars']!r}")


def _check_files(dataset: Dataset) -> Iterator[Finding]:
    """The table of shards in itself, and against the files of the folder."""
    table, columns = str(dataset.place / SHARDS), dataset.table.select(["index", "split", "samples"]).to_pydict()
    known = set(dataset.table["name"].to_pylist()) | set(columns["index"])
    if len(set(columns["index"])) < len(columns["index"]):
        yield Finding(table, None, "names an index for two shards")
    for split in sorted(set(columns["split"]) - set(SPLITS)):
        yield Finding(table, None, f"has shards of a split {split!r}, there are only {', '.join(SPLITS)}")
    if min(columns["samples"], default=1) < 1:
        yield Finding(table, None, "has a shard without samples")
    for name in dataset.place.list():
        if _OURS.fullmatch(name) and name not in known:
            what = f"is not in {SHARDS}: who reads all that are named like it would take it for part of the dataset"
            yield Finding(str(dataset.place / name), None, what)


def _of_opening(place: Place, error: DamageError) -> Finding:
    """What hinders the opening, by the file that its message begins with."""
    files = (str(place / name) for name in (SHARDS, CARD))
    file = next((name for name in files if str(error).startswith(name)), str(place))
    return Finding(file, None, f"{str(error).removeprefix(file).lstrip(': ')}; nothing else can be looked at")
