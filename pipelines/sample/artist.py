"""The actors that draw: they hold the network, and make chunks whole. One cuts them and commits them."""

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from socket import gethostname
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_core import GaussianDiffusion, UNet
from pipelines.data.manifest import content_hash
from pipelines.data.shards import encode_png
from pipelines.data.write import Rows, Sums, commit_shard
from pipelines.drawing import draw
from pipelines.errors import Failed, one_line
from pipelines.models import Model
from pipelines.sample.job import OF_THE_PATH, SPLIT, Job, Part
from pipelines.sample.pace import Made
from pipelines.train.run import changes, environment


class Drawer:
    """Holds the network of one job, on the device that Ray gave it."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.settings.threads)
        self._job = job
        self._built: tuple[GaussianDiffusion, UNet] | None = None
        self._size = 0

    def ready(self) -> None:
        """Answers when the process is there."""

    def drawn(self, shared: tuple[Any], chunk: int) -> NDArray[np.uint8]:
        """A whole chunk, uint8 [chunk, H, W, C]."""
        from pipelines.data.pixels import to_pixels

        with told_of_memory():
            process, unet = self._network(shared)
            return to_pixels(draw(process, unet, self._size, self._job.settings, self._indices(chunk)))

    def _indices(self, chunk: int) -> range:
        """Of the images of a chunk."""
        size = self._job.settings.chunk
        return range(chunk * size, (chunk + 1) * size)

    def _network(self, shared: tuple[Any]) -> tuple[GaussianDiffusion, UNet]:
        if self._built is None:
            import ray

            model: Model = ray.get(shared[0])
            process, unet = model.build()
            self._built = process, unet.to("cuda" if self._has_gpu() else "cpu")
            self._size = model.spec.data.image_size
        return self._built

    def _has_gpu(self) -> bool:
        import ray

        return bool(ray.get_gpu_ids())


@contextmanager
def told_of_memory() -> Iterator[None]:
    """Failed, in a line, where memory runs out in the block; torch has no class of its own for that on CPUs."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise Failed(f"sample.chunk: memory ran out, lower it ({one_line(error)})") from None


class Artist(Drawer):
    """Draws chunks and commits them."""

    def do(self, shared: tuple[Any], part: Part) -> Made:
        """Make and commit a part, unless another process has, or has meanwhile."""
        began, drawing = time.time(), 0.0
        with _told_of_place(self._job):
            if not self._job.is_served(part):
                self._network(shared)
                drew = time.monotonic()
                pixels = self.drawn(shared, part.chunk)[: part.count]
                drawing = time.monotonic() - drew
                _ = self._changed  # said before the first images are there
                if not self._job.is_served(part):
                    commit(self._job, part, pixels)
        return Made(part.count, (gethostname(), os.getpid()), began, time.time(), drawing, self._changed)

    @cached_property
    def _changed(self) -> tuple[str, ...]:
        import torch

        here = {**environment(), "device": torch.cuda.get_device_name() if self._has_gpu() else "cpu"}
        return tuple(changes(self._job.first_environment(here), here))


@contextmanager
def _told_of_place(job: Job) -> Iterator[None]:
    """Failed, in a line, where the block finds that this host cannot write into the job's folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_PATH | {errno.ENOENT, errno.ESTALE}:
            raise
        raise Failed(
            f"--out {job.place}: cannot be written to on {gethostname()} ({error.strerror}); name a folder that all "
            "hosts of the cluster share, or s3://bucket/prefix"
        ) from None


def commit(job: Job, part: Part, pixels: NDArray[np.uint8]) -> None:
    """Write a part's shard and index, then its record."""
    indices = range(part.first, part.first + part.count)
    notes: list[dict[str, int]] = [{"seed": job.settings.seed, "index": index} for index in indices]
    labels = job.labels(indices)
    if job.classes is not None:
        notes = [{**note, "label": label} for note, label in zip(notes, labels, strict=True)]
    sums = Sums(pixels.shape[-1])
    sums.add(pixels)
    rows = Rows(
        keys=[f"{index:09d}" for index in indices],
        pictures=[encode_png(image) for image in pixels],
        notes=notes,
        contents=[content_hash(image) for image in pixels],
        labels=labels,
    )
    job.commit(part, commit_shard(job.place, part.shard, part.index, SPLIT, rows, sums))
