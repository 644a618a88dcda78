"""A sampling job's place: chunks of one identity, each with a shard, its index and a commit record.

    job.json                    the identity (model, sampler, steps, seed, chunk size, threads), and where the model
                                came from
    environment.json            what the first images were drawn with
    samples-000000.tar          a chunk's images, KEY.png + KEY.json, and samples-000000.parquet, their index
    samples-000007-first-30.tar the last chunk, of which the first 30 images were asked for
    chunks/000000.json          a chunk's commit record, written last
    dataset.json, shards.parquet, card.md, sheet.png   what makes the shards a dataset (`pipelines.data.manifest`)
    manifest.json               n and the sha256 of all pixels, written when all is done

Of a chunk's files, the name determines the bytes: whoever writes one twice, a killed attempt's process say that lives
on, writes the same.
"""

import errno
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.data.shards import members, unpack
from pipelines.data.sources import NO_LABEL
from pipelines.data.write import ShardRecord, is_whole, record_of
from pipelines.drawing import Settings
from pipelines.errors import UserError, one_line
from pipelines.store import DamageError, Place, check_store, identity, sha256

FORMAT = 5
_STEM = r"(\d{6,}(?:-first-\d+)?)"
_SHARD = re.compile(rf"samples-{_STEM}\.(?:tar|parquet)")
_RECORD = re.compile(rf"{_STEM}\.json")
JOB, ENVIRONMENT, MANIFEST, LOCK = "job.json", "environment.json", "manifest.json", ".lock"
IMAGES = "images"
"""Folder of the PNG files."""
OF_THE_PATH = {errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS}
"""What the user's name for the place is to blame for."""
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
        try:
            if self.place.is_local and self.place.path.exists() and not self.place.path.is_dir():
                raise UserError(f"--out {self.place}: is a file; name a folder")
            self._check_what_is_there()
        except OSError as error:
            if error.errno not in OF_THE_PATH:
                raise
            raise UserError(f"--out {self.place}: {error.strerror or one_line(error)}; name another folder") from None
        check_store(self.place)

    def _check_what_is_there(self) -> None:
        there = self._there()
        if there is not None:
            record = self.record()
            if differing := sorted(k for k in record if there.get(k) != record[k]):
                raise UserError(
                    f"--out {self.place}: holds another sampling job, which differs in {', '.join(differing)}; "
                    "name another folder"
                )
        elif set(self.place.list()) - {LOCK} and not self._has_begun():
            raise UserError(f"--out {self.place}: is not empty and holds no sampling job; name another folder")

    def _has_begun(self) -> bool:
        """Whether chunks of this very job are there: its own file alone is damaged or lost."""
        return any(self.committed(part) is not None for parts in self.parts().values() for part in parts)

    def is_claimed(self) -> bool:
        """Whether the place has been taken for this job."""
        return (self.place / JOB).exists() or self._has_begun()

    def claim(self, origin: str, average: str) -> None:
        """Take the place for this job, with its lock held. Words say where the model comes from, and which average of a
        run's weights it is."""
        self.sweep()
        if self._there() is None:
            (self.place / JOB).write_json({**self.record(), "origin": origin, "average": average})

    def first_environment(self, now: Mapping[str, str]) -> Mapping[str, str]:
        """What the first images are drawn with: what is given, and kept from now on, where nothing is known of it."""
        kept = self.place / ENVIRONMENT
        for _ in range(2):
            if kept.claim(json.dumps(dict(now), indent=2, sort_keys=True).encode()):
                return now
            with suppress(ValueError, FileNotFoundError):
                if isinstance(there := kept.read_json(), dict):
                    return there
            kept.delete()  # it was damaged
        return now

    def sweep(self) -> None:
        """Remove what killed processes have left half-written."""
        for folder in (self.place, self.records):
            folder.sweep_temporaries()

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Hold the place while the block runs, which is given what checks that it still is held. UserError where
        another process does."""
        with (self.place / LOCK).lock(f"sampling into {self.place}") as check_held:
            yield check_held

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
            record, said = record_of(found["shard"]), {k: v for k, v in found.items() if k != "digest"}
            return record if found["digest"] == identity(said) and said == self._commit(part, record) else None
        except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError):
            return None

    def is_served(self, part: Part) -> bool:
        """Whether a part, or the whole chunk, is committed."""
        return any(self.committed(one) is not None for one in {part, Part(part.chunk, part.size, part.size)})

    def commit(self, part: Part, record: ShardRecord) -> None:
        """Say that a part's shard and index are written."""
        said = self._commit(part, record)
        self.record_of(part).write_json({**said, "digest": identity(said)})

    def _commit(self, part: Part, record: ShardRecord) -> dict[str, Any]:
        """What a commit record says, as plain JSON, but for the digest of just this."""
        fields = {"format": FORMAT, "job": self.identity, "model_digest": self.model_digest, "count": part.count}
        shard = {**asdict(record), "name": part.shard, "index": part.index, "samples": part.count}
        return json.loads(json.dumps({**fields, "sha256": record.sha256, "shard": shard}))

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

    def reaches_beyond(self, n: int) -> bool:
        """Whether a part is committed that has images beyond the first n: of a larger job."""
        beyond = (part for parts in self.parts().values() for part in parts if part.first + part.count > n)
        return any(self.committed(part) is not None for part in beyond)

    def wanted(self, n: int) -> list[Part]:
        return list(parts_of(n, self.settings.chunk))

    def chunks_of(self, n: int) -> int:
        """Chunks that the first n images lie in."""
        return -(-n // self.settings.chunk)

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

    def average(self) -> str | None:
        """Which average of a run's weights the model is, in words; None where nothing is said of it."""
        return (self._there() or {}).get("average")

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
        """The record that lies there; None where there is none, or what is there is none."""
        try:
            found = (self.place / JOB).read_json()
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and "format" in found else None


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
