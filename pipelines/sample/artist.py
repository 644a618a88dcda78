"""The actors that draw: they hold the network, and make chunks whole. One cuts them and commits them."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from pipelines.sample.job import SPLIT, Job, Part
from pipelines.sample.pace import Made
from pipelines.train.run import environment


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
            self._built = process, unet.to("cuda" if ray.get_gpu_ids() else "cpu")
            self._size = model.spec.data.image_size
        return self._built


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

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._environment = environment()

    def do(self, shared: tuple[Any], part: Part) -> Made:
        """Make and commit a part, unless another process has."""
        began, process = time.time(), (gethostname(), os.getpid())
        if self._job.committed(part) is not None:
            return Made(part.count, process, began, time.time(), 0.0, self._environment)
        self._network(shared)
        drew = time.monotonic()
        pixels = self.drawn(shared, part.chunk)[: part.count]
        drawing = time.monotonic() - drew
        commit(self._job, part, pixels)
        return Made(part.count, process, began, time.time(), drawing, self._environment)


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
