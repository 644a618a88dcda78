"""The end of a sampling job: every image is read again, the shards become a dataset, the manifest is written."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.data.card import SHEET_IMAGES, sheet_of
from pipelines.data.card import commit as commit_dataset
from pipelines.data.manifest import SHEET, SPLITS, content_hash, dataset_digest
from pipelines.data.recipe import Recipe
from pipelines.data.write import ShardRecord
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.sample.job import MANIFEST, SPLIT, Job, Part
from pipelines.sample.pace import Made, drawing_share, images_per_second
from pipelines.store import DamageError


@dataclass(frozen=True)
class Samples:
    """A finished job."""

    out: str
    n: int
    sha256: str
    """Over the raw uint8 HWC pixels, in index order."""
    sheet: str | None
    """A contact sheet; none of a part of a job that has not come to its end."""
    made: int = 0
    """Images that were drawn for it now; the others had been there."""
    images_per_second: float | None = None
    drawing_share: float | None = None
    """Of the time of the processes that drew them, the part inside the sampler."""


def finish(
    job: Job, n: int, model: Model, made: list[Made], check_held: Callable[[], None], progress: Progress
) -> Samples:
    """Make the first n images, which are all committed, a dataset with its manifest; where there are more of a larger
    job, done or not, they are only read."""
    parts = job.parts_read(n)
    read = _Reading(job, parts, n, progress)
    if n >= job.finished() and not job.reaches_beyond(n):
        _commit(job, parts, read, n, model, check_held)
    else:
        deque(read.samples(), maxlen=0)
        if not job.finished():
            progress.say(
                f"{job.place}: has images of a larger job that has not ended; the first {n:,} are served, and it "
                "becomes a dataset when the larger one is done"
            )
    check_held()
    job.sweep()  # of processes, too, that outlived a killed attempt
    drawn = sum(part.count for part in made)
    sheet = str(job.place / SHEET) if job.finished() else None
    speed = (images_per_second(made), drawing_share(made))
    return Samples(str(job.place), n, read.pixels.hexdigest(), sheet, drawn, *speed)


def _commit(
    job: Job, parts: list[Part], read: "_Reading", n: int, model: Model, check_held: Callable[[], None]
) -> None:
    """Write what makes the parts a dataset, and the manifest."""
    sizes = {split: [part.count for part in parts if split == SPLIT] for split in SPLITS}
    digest = dataset_digest(sizes, read.samples())
    check_held()
    commit_dataset(
        job.place,
        [_record(job, part) for part in parts],
        Recipe(
            image_size=model.spec.data.image_size,
            channels=model.spec.data.channels,
            held_out=0,
            shard_images=job.settings.chunk,
        ),
        digest=digest,
        classes=[str(label) for label in range(model.spec.model.classes or 0)],
        source={"kind": "model", "name": job.origin()},
        found={"model_digest": job.model_digest},
        sheet=sheet_of(read.shown),
    )
    told = {"n": n, "sha256": read.pixels.hexdigest(), "dataset_digest": digest}
    check_held()
    (job.place / MANIFEST).write_json({**job.record(), **told})
    _remove_others(job, parts, check_held)


def _record(job: Job, part: Part) -> ShardRecord:
    record = job.committed(part)
    if record is None:  # it was there when its images were read
        raise DamageError(f"{job.record_of(part)} is missing; the same command makes it again")
    return record


def _remove_others(job: Job, parts: list[Part], check_held: Callable[[], None]) -> None:
    """Delete smaller parts of chunks that are larger by now, and what was never committed: who reads all shards would
    read their images too."""
    ours = {part.stem for part in parts}
    for stem in job.stems() - ours:
        check_held()
        job.forget(Part.of_stem(stem, job.settings.chunk))


class _Reading:
    """One pass over the images in index order, each shard verified, and what is known of them at its end."""

    def __init__(self, job: Job, parts: list[Part], n: int, progress: Progress) -> None:
        self._job, self._parts, self._n, self._progress = job, parts, n, progress
        self.pixels = hashlib.sha256()
        self.shown: list[NDArray[np.uint8]] = []
        """The first images, for a contact sheet."""

    def samples(self) -> Iterator[tuple[bytes, int]]:
        """Content and label of each image."""
        for part in self._parts:
            images = self._job.pixels(part)[: self._n - part.first]
            self.pixels.update(images.tobytes())
            self.shown += list(images[: SHEET_IMAGES - len(self.shown)])
            labels = self._job.labels(range(part.first, part.first + len(images)))
            yield from zip(map(content_hash, images), labels, strict=True)
            self._progress.advance(min(self._n, part.first + part.count), self._n, "images read back")
