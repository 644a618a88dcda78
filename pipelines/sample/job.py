"""A sampling job's place: chunks of one identity, each with a shard, its index and a commit record.

    job.json                    the identity (model, sampler, steps, seed, chunk size, threads) and what it was begun on
    samples-000000.tar          a chunk's images, KEY.png + KEY.json, and samples-000000.parquet, their index
    samples-000007-first-30.tar the last chunk, of which the first 30 images were asked for
    chunks/000000.json          a chunk's commit record, written last
    dataset.json, shards.parquet, card.md, sheet.png   what makes the shards a dataset (`pipelines.data.manifest`)
    manifest.json               n and the sha256 of all pixels, written when all is done

Of a chunk's files, the name determines the bytes: whoever writes one twice, a killed attempt's process say that lives
on, writes the same.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.data.shards import members, unpack
from pipelines.data.sources import NO_LABEL
from pipelines.data.write import ShardRecord, is_whole, record_of
from pipelines.drawing import Settings
from pipelines.errors import UserError
from pipelines.store import DamageError, Place, check_writable, identity, sha256
from pipelines.train.run import environment

FORMAT = 4
_STEM = r"(\d{6,}(?:-first-\d+)?)"
_SHARD = re.compile(rf"samples-{_STEM}\.(?:tar|parquet)")
_RECORD = re.compile(rf"{_STEM}\.json")
JOB, MANIFEST, LOCK = "job.json", "manifest.json", ".lock"
SPLIT = "train"
"""Of the dataset that the shards make: images to train on, none held out."""


@dataclass(frozen=True)
class Part:
    """The first images of a chunk: all of them, but where the job ends within it."""

    chunk: int
    count: int
    size: int
    """Images of a whole chunk."""

    @property
    def stem(self) -> str:
        return f"{self.chunk:06d}" if self.count == self.size else f"{self.chunk:06d}-first-{self.count}"

    @property
    def shard(self) -> str:
        return f"samples-{self.stem}.tar"

    @property
    def index(self) -> str:
        return f"samples-{self.stem}.parquet"

    @property
    def first(self) -> int:
        """The index of its first image."""
        return self.chunk * self.size

    def serves(self, other: "Part") -> bool:
        """Whether it holds all images of another part."""
        return self.chunk == other.chunk and self.count >= other.count

    @staticmethod
    def of_stem(stem: str, size: int) -> "Part":
        """The part whose files have this stem."""
        chunk, separator, count = stem.partition("-first-")
        return Part(int(chunk), int(count) if separator else size, size)


def parts_of(n: int, size: int) -> Iterator[Part]:
    """The parts that the first n images are."""
    for chunk in range(-(-n // size)):
        yield Part(chunk, min(size, n - chunk * size), size)


@dataclass(frozen=True)
class Job:
    """Chunks of one identity in one place."""

    place: Place
    settings: Settings
    model: str
    """Identity of the model."""
    model_digest: str
    classes: int | None
    """That the model knows."""

    def record(self) -> dict[str, Any]:
        """What tells this job from any other, as plain JSON."""
        model = {"model": self.model, "model_digest": self.model_digest}
        return json.loads(json.dumps({"format": FORMAT, **model, "classes": self.classes, **asdict(self.settings)}))

    @property
    def identity(self) -> str:
        return identity(self.record())

    def check_place(self) -> None:
        """UserError where the place cannot be written, or holds another job or other files."""
        if self.place.is_local and self.place.path.exists() and not self.place.path.is_dir():
            raise UserError(f"--out {self.place}: is a file; name a folder")
        there = self._there()
        if there is not None:
            record = self.record()
            if differing := sorted(k for k in record if there.get(k) != record[k]):
                raise UserError(
                    f"--out {self.place}: holds another sampling job, which differs in {', '.join(differing)}; "
                    "name another folder"
                )
        elif set(self.place.list()) - {LOCK}:
            raise UserError(f"--out {self.place}: is not empty and holds no sampling job; name another folder")
        check_writable(self.place)

    def claim(self, origin: str) -> None:
        """Take the place for this job, with its lock held. `origin` says in words where the model comes from."""
        self.check_place()
        self.sweep()
        if not (self.place / JOB).exists():
            (self.place / JOB).write_json({**self.record(), "origin": origin, "environment": environment()})

    def sweep(self) -> None:
        """Remove what killed processes have left half-written."""
        self.place.sweep_temporaries()
        self.records.sweep_temporaries()

    @property
    def records(self) -> Place:
        """The folder of the commit records."""
        return self.place / "chunks"

    def record_of(self, part: Part) -> Place:
        return self.records / f"{part.stem}.json"

    def committed(self, part: Part) -> ShardRecord | None:
        """What was committed of a part of this very job; None where nothing was, or what is there is no such record."""
        try:
            found = self.record_of(part).read_json()
            return record_of(found["shard"]) if (found["format"], found["job"]) == (FORMAT, self.identity) else None
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError):
            return None

    def commit(self, part: Part, record: ShardRecord) -> None:
        """Say that a part's shard and index are written."""
        fields = {"format": FORMAT, "job": self.identity, "model_digest": self.model_digest, "count": part.count}
        self.record_of(part).write_json({**fields, "sha256": record.sha256, "shard": asdict(record)})

    def forget(self, part: Part) -> None:
        """Delete what is there of a part: its record first, so that nobody takes the rest for whole."""
        for file in (self.record_of(part), self.place / part.index, self.place / part.shard):
            file.delete()

    def parts(self) -> dict[int, list[Part]]:
        """By chunk, the parts that have a commit record, the largest last; by one listing."""
        found: dict[int, list[Part]] = {}
        for name in self.records.list():
            if record := _RECORD.fullmatch(name):
                part = Part.of_stem(record[1], self.settings.chunk)
                found.setdefault(part.chunk, []).append(part)
        return {chunk: sorted(parts, key=lambda part: part.count) for chunk, parts in found.items()}

    def serving(self, n: int) -> list[Part] | None:
        """The committed parts that hold the first n images, in order, by their records alone; None where one lacks."""
        found = self.parts()
        chosen = [next((p for p in found.get(wanted.chunk, ()) if p.serves(wanted)), None) for wanted in self.wanted(n)]
        return None if None in chosen else [part for part in chosen if part is not None]

    def wanted(self, n: int) -> list[Part]:
        return list(parts_of(n, self.settings.chunk))

    def holds(self, n: int) -> bool:
        """Whether the first n images lie there, by their records and sizes: their bytes are verified when read."""
        parts = self.serving(n)
        if parts is None:
            return False
        for part in parts:
            record, shard = self.committed(part), self.place / part.shard
            try:
                if record is None or shard.size() != record.bytes:
                    return False
            except FileNotFoundError:
                return False
        return True

    def is_whole(self, part: Part) -> bool:
        """Whether a part is committed, and its shard and index are what was committed."""
        record = self.committed(part)
        return record is not None and is_whole(self.place, record)

    def pixels(self, part: Part) -> np.ndarray:
        """The images of a committed part, uint8 [count, H, W, C]. DamageError where they are not what was committed."""
        return unpack(self._verified(part))

    def pictures(self, part: Part) -> list[tuple[str, bytes]]:
        """Name and bytes of the PNG files of a committed part. DamageError as by `pixels`."""
        return members(self._verified(part))

    def _verified(self, part: Part) -> bytes:
        record, shard = self.committed(part), self.place / part.shard
        try:
            data = shard.read()
        except FileNotFoundError:
            raise DamageError(f"{shard} is missing; the same command makes it again") from None
        if record is None or sha256(data) != record.sha256:
            raise DamageError(f"{shard} does not match its commit record; the same command makes it again")
        return data

    def parts_read(self, n: int) -> list[Part]:
        """The committed parts that hold the first n images. DamageError where they are not all there."""
        parts = self.serving(n)
        if parts is None:
            raise DamageError(f"{self.place} does not hold {n:,} images; the same command makes the others")
        return parts

    def read(self, n: int) -> Iterator[np.ndarray]:
        """The first n images in index order, chunk by chunk, uint8 [<=chunk, H, W, C], each shard verified.

        DamageError where they are not all there.
        """
        for part in self.parts_read(n):
            yield self.pixels(part)[: n - part.first]

    def labels(self, indices: range) -> list[int]:
        """The class of each image, NO_LABEL of all where the model has none."""
        return self.settings.labels_of(self.classes, indices) or [NO_LABEL] * len(indices)

    def origin(self) -> str:
        """Where the model came from when the job was begun, in words."""
        return str((self.place / JOB).read_json().get("origin", self.model_digest))

    def finished(self) -> int:
        """The largest n that is done; 0 where none is."""
        try:
            return int((self.place / MANIFEST).read_json()["n"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0

    def stems(self) -> set[str]:
        """Of all shards and indices that are there, with a record or without."""
        return {found[1] for name in self.place.list() if (found := _SHARD.fullmatch(name))}

    def _there(self) -> dict[str, Any] | None:
        try:
            return dict((self.place / JOB).read_json())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise UserError(f"--out {self.place}: {JOB} there is not a sampling job's; name another folder") from None


def job_at(place: Place) -> Job:
    """The job that lies in a place. UserError for another format, DamageError for what is none."""
    try:
        record = (place / JOB).read_json()
        if record["format"] != FORMAT:
            raise UserError(f"{place / JOB}: format {record['format']} is not known here, only {FORMAT}")
        return Job(place, Settings.of_record(record), record["model"], record["model_digest"], record["classes"])
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DamageError(f"{place / JOB} is not a sampling job's: {error!r}") from None
