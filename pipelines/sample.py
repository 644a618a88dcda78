"""Bulk sampling: fixed chunks over a pool of Ray actors, each committed by itself.

Image i of a job is a function of (weights, sampler settings, seed, i). A chunk is always computed whole and then cut,
so that its bytes do not depend on how many images were asked for, on the pool, or on which actor made it. A rerun makes
the missing chunks only; a larger n extends; a job of another identity in the same place is refused.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ddpm_core import GaussianDiffusion, UNet
from pipelines.cluster import Cluster
from pipelines.data.shards import encode_png, pack, unpack
from pipelines.drawing import Settings, draw, labels_of
from pipelines.errors import Failed, UserError
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.session import Session
from pipelines.spec import Spec
from pipelines.store import DamageError, Place, check_writable, identity, sha256

FORMAT = 3
_CHUNK_RETRIES = 3
_JOB, _MANIFEST, _LOCK = "job.json", "manifest.json", ".lock"


@dataclass(frozen=True)
class Samples:
    """A finished job."""

    out: str
    n: int
    sha256: str
    """Over the raw uint8 HWC pixels, in index order."""


@dataclass(frozen=True)
class Job:
    """Chunks of one identity in one place."""

    place: Place
    settings: Settings
    model: str
    """Identity of the model."""
    model_digest: str

    def record(self) -> dict[str, Any]:
        model = {"model": self.model, "model_digest": self.model_digest}
        return {"format": FORMAT, **model, **asdict(self.settings)}

    def check_place(self) -> None:
        """UserError where the place cannot be written, or holds another job or other files."""
        record = self.record()
        if self.place.is_local and self.place.path.exists() and not self.place.path.is_dir():
            raise UserError(f"--out {self.place}: is a file; name a folder")
        if (self.place / _JOB).exists():
            there = (self.place / _JOB).read_json()
            differing = sorted(k for k in record if there.get(k) != record[k])
            if differing:
                raise UserError(
                    f"--out {self.place}: holds another sampling job, which differs in {', '.join(differing)}; "
                    "name another folder"
                )
        elif set(self.place.list()) - {_LOCK}:
            raise UserError(f"--out {self.place}: is not empty and holds no sampling job; name another folder")
        check_writable(self.place)

    def claim(self) -> None:
        """Take the place for this job, with its lock held."""
        self.check_place()
        if not (self.place / _JOB).exists():
            (self.place / _JOB).write_json(self.record())

    def shard(self, chunk: int) -> Place:
        return self.place / f"samples-{chunk:06d}.tar"

    def commit_record(self, chunk: int) -> Place:
        return self.place / "chunks" / f"{chunk:06d}.json"

    def committed(self, chunk: int) -> int:
        """Images of a chunk that are committed; 0 where it is missing or its shard is not what was committed."""
        record, shard = self._record_of(chunk), self.shard(chunk)
        if record is None:
            return 0
        return record["count"] if shard.exists() and sha256(shard.read()) == record["sha256"] else 0

    def holds(self, n: int) -> bool:
        """Whether the first n images lie there, by their records and sizes: their bytes are verified when read."""
        size = self.settings.chunk
        for chunk in range(-(-n // size)):
            record, shard = self._record_of(chunk), self.shard(chunk)
            if record is None or record["count"] < min(size, n - chunk * size):
                return False
            if not shard.exists() or shard.size() != record["bytes"]:
                return False
        return True

    def _record_of(self, chunk: int) -> dict[str, Any] | None:
        """The commit record of a chunk of this very job."""
        try:
            record = self.commit_record(chunk).read_json()
        except FileNotFoundError:
            return None
        return record if (record["format"], record["job"]) == (FORMAT, identity(self.record())) else None

    def read(self, n: int) -> Iterator[np.ndarray]:
        """The first n images in index order, chunk by chunk, uint8 [<=chunk, H, W, C], each shard verified."""
        for chunk in range(-(-n // self.settings.chunk)):
            data = self.shard(chunk).read()
            if sha256(data) != self.commit_record(chunk).read_json()["sha256"]:
                raise DamageError(f"{self.shard(chunk)} does not match its commit record")
            yield unpack(data)[: n - chunk * self.settings.chunk]


class _Artist:
    """An actor: holds the network, makes chunks."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.settings.threads)
        self._job = job
        self._built: tuple[GaussianDiffusion, UNet] | None = None

    def make(self, model: Model, chunk: int, count: int) -> int:
        """Make and commit the first `count` images of a chunk: the shard, then its record.

        The model comes with every call (from shared memory), so that an actor that was started anew has it too.
        """
        from pipelines.data.pixels import to_pixels

        job, settings = self._job, self._job.settings
        indices = range(chunk * settings.chunk, (chunk + 1) * settings.chunk)
        self._built = self._built or model.build()
        process, unet = self._built
        images = to_pixels(draw(process, unet, model.spec.data.image_size, settings, indices))[:count]
        indices = indices[:count]
        notes: list[dict[str, int]] = [{"seed": settings.seed, "index": i} for i in indices]
        if (labels := labels_of(unet, indices)) is not None:
            notes = [{**note, "label": label} for note, label in zip(notes, labels, strict=True)]
        data = pack([f"{i:09d}" for i in indices], [encode_png(image) for image in images], notes)
        job.shard(chunk).write(data)
        record = {
            "format": FORMAT,
            "job": identity(job.record()),
            "model_digest": job.model_digest,
            "count": count,
            "bytes": len(data),
            "sha256": sha256(data),
        }
        job.commit_record(chunk).write_json(record)
        return count


def sample_job(
    model: Model, settings: Settings, n: int, out: Place, cluster: Cluster, workers: int, progress: Progress
) -> Samples:
    """Make images 0..n-1 of a job in `out`; those that are there already are kept."""
    job = Job(out, settings, model.identity, model.digest)
    job.check_place()
    with (out / _LOCK).lock(f"sampling into {out}"):
        job.claim()
        missing = _missing(job, n)
        done = n - sum(count for _, count in missing)
        if done:
            progress.advance(done, n, "images")
        if missing:
            for count in _make(model, job, missing, cluster, workers):
                done += count
                progress.advance(done, n, "images")
        digest = hashlib.sha256()
        for images in job.read(n):
            digest.update(images.tobytes())
        samples = Samples(str(out), n, digest.hexdigest())
        if not (out / _MANIFEST).exists() or (out / _MANIFEST).read_json()["n"] <= n:
            (out / _MANIFEST).write_json({**job.record(), "n": n, "sha256": samples.sha256})
    return samples


def sample_spec(model: Model, spec: Spec, n: int, session: Session) -> Samples:
    """The first n images of the job that a spec describes, in the store's place for it."""
    settings = Settings.of(spec.sample)
    name = f"{spec.name}-{identity([model.identity, asdict(settings)])[:12]}"
    out = session.store / "samples" / name
    return sample_job(model, settings, n, out, session.cluster, spec.sample.workers, session.progress)


def read_samples(samples: Samples, n: int) -> Iterator[np.ndarray]:
    """The first n images of a finished job, in index order, uint8 [<=chunk, H, W, C] at a time."""
    return _job_at(Place.of(samples.out)).read(n)


def holds_samples(place: Place, n: int) -> bool:
    """Whether a finished job lies in a place, with its first n images."""
    return (place / _MANIFEST).exists() and _job_at(place).holds(n)


def _job_at(place: Place) -> Job:
    record = (place / _JOB).read_json()
    settings = Settings(**{name: record[name] for name in Settings.__dataclass_fields__})
    return Job(place, settings, record["model"], record["model_digest"])


def _missing(job: Job, n: int) -> list[tuple[int, int]]:
    """(chunk, images wanted of it) of every chunk that is not committed that far."""
    size = job.settings.chunk
    wanted = ((chunk, min(size, n - chunk * size)) for chunk in range(-(-n // size)))
    return [(chunk, count) for chunk, count in wanted if job.committed(chunk) < count]


def _make(model: Model, job: Job, missing: list[tuple[int, int]], cluster: Cluster, workers: int) -> Iterator[int]:
    """Make chunks on a pool of actors; yields the images of each one as it is committed."""
    ray = cluster.connect()
    cluster.check_cpus("sample.threads", job.settings.threads)
    actors = min(workers, len(missing), max(1, cluster.cpus() // job.settings.threads))
    # An actor that dies is started anew and its chunk made again; a commit is whole or not there. A chunk that kills
    # every process that tries it (for want of memory, mostly) ends the job.
    options = {"num_cpus": job.settings.threads, "max_restarts": -1, "max_task_retries": _CHUNK_RETRIES}
    artist = ray.remote(**options)(_Artist)
    shared = ray.put(model)
    pool = [artist.remote(job) for _ in range(actors)]
    try:
        waiting = list(reversed(missing))
        running: dict[Any, tuple[Any, int]] = {}

        def start(actor: Any) -> None:
            chunk, count = waiting.pop()
            running[actor.make.remote(shared, chunk, count)] = (actor, chunk)

        for actor in pool:
            start(actor)
        while running:
            finished, _ = ray.wait(list(running), num_returns=1)
            actor, chunk = running.pop(finished[0])
            if waiting:
                start(actor)
            try:
                yield ray.get(finished[0])
            except ray.exceptions.RayActorError:
                raise Failed(
                    f"chunk {chunk} ended its process {_CHUNK_RETRIES + 1} times; if memory ran out, "
                    "lower sample.chunk or sample.workers"
                ) from None
    finally:
        for actor in pool:
            ray.kill(actor)
