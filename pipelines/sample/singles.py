"""Single images of a job made again, or watched on their way out of noise: their chunks are drawn anew, whole."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import report
from pipelines.data.shards import encode_png
from pipelines.drawing import Settings, draw
from pipelines.errors import UserError
from pipelines.models import Model
from pipelines.sample.artist import Drawer, told_of_memory
from pipelines.sample.bulk import Studio, claimed
from pipelines.sample.forms import write_images
from pipelines.sample.job import Job
from pipelines.store import Place

TRAJECTORY = "trajectory.png"
MOST_STRIPS = 8
_FRAMES = 9

Chosen = tuple[int, tuple[int, ...]]
"""A chunk, and which of its images are wanted, counted from its first."""


@dataclass(frozen=True)
class Singles:
    """Images that were made again."""

    out: str
    n: int
    sha256: str
    """Over the raw uint8 HWC pixels, in index order."""
    images: dict[int, str]
    """By index, the PNG file."""


def sample_images(model: Model, settings: Settings, indices: Sequence[int], out: Place, studio: Studio) -> Singles:
    """Draw the images of these indices of a job, and write each as `OUT/images/INDEX.png`: the same bytes as in its
    shards. UserError where the place holds something else."""
    job = Job(out, settings, model.identity, model.digest, model.spec.model.classes)
    wanted = sorted(set(indices))
    chunks = _by_chunk(wanted, settings.chunk)
    with claimed(job, model, studio) as check_held:
        drawn: dict[int, NDArray[np.uint8]] = {}
        for place, pixels in studio.pool(job, model, _Redrawer, chunks).results():
            chunk, rows = chunks[place]
            drawn |= {chunk * settings.chunk + row: image for row, image in zip(rows, pixels, strict=True)}
            studio.progress.advance(len(drawn), len(wanted), "images")
        check_held()
        files = write_images(job, {index: encode_png(drawn[index]) for index in wanted})
    digest = hashlib.sha256()
    for index in wanted:
        digest.update(drawn[index].tobytes())
    return Singles(str(out), len(wanted), digest.hexdigest(), files)


def draw_trajectory(model: Model, settings: Settings, indices: Sequence[int], out: Place, studio: Studio) -> Place:
    """Write the picture of how the first eight, at most, of these images of a job come out of noise, in its place."""
    job = Job(out, settings, model.identity, model.digest, model.spec.model.classes)
    shown = sorted(set(indices))[:MOST_STRIPS]
    with claimed(job, model, studio) as check_held:
        picture = report.strips(*trace(model, settings, shown, out, studio))
        check_held()
        (out / TRAJECTORY).write(picture)
    return out / TRAJECTORY


def trace(
    model: Model, settings: Settings, indices: Sequence[int], out: Place, studio: Studio
) -> tuple[NDArray[np.uint8], list[int]]:
    """Moments of images of a job on their way out of noise, uint8 [N, moments, H, W, C] in order of their indices, and
    the timestep of each moment, 0 for the end: there they are the job's images."""
    job = Job(out, settings, model.identity, model.digest, model.spec.model.classes)
    chunks = _by_chunk(sorted(set(indices)), settings.chunk)
    traced = dict(studio.pool(job, model, _Tracer, chunks).results())
    return np.concatenate([traced[place][0] for place in range(len(chunks))]), traced[0][1]


class _Redrawer(Drawer):
    def do(self, shared: tuple[Any], chosen: Chosen) -> Any:
        """The pixels of the chosen images of a chunk, uint8 [N, H, W, C]."""
        chunk, rows = chosen
        return self.drawn(shared, chunk)[list(rows)]


class _Tracer(Drawer):
    def do(self, shared: tuple[Any], chosen: Chosen) -> Any:
        """Moments of the chosen images of a chunk, uint8 [N, frames, H, W, C], and their timesteps, 0 for the end."""
        from pipelines.data.pixels import to_pixels

        chunk, rows = chosen
        settings = self._job.settings
        process, unet = self._network(shared)
        moments = np.unique(((1 - np.linspace(1, 0, _FRAMES) ** 2) * settings.steps).round().astype(int)).tolist()
        frames: list[NDArray[np.uint8]] = []
        times: list[int] = []

        def watch(index: int, t: int, x_t: Any, x0: Any) -> None:
            if index in moments:
                frames.append(to_pixels(x_t[list(rows)]))
                times.append(t)

        with told_of_memory():
            drawn = draw(process, unet, self._size, settings, self._indices(chunk), callback=watch)
        final = to_pixels(drawn)[list(rows)]
        return np.stack([*frames, final], axis=1), [*times, 0]


def _by_chunk(indices: Sequence[int], size: int) -> list[Chosen]:
    if indices[0] < 0:
        raise UserError(f"--images {indices[0]}: images are counted from 0")
    found: dict[int, list[int]] = defaultdict(list)
    for index in indices:
        found[index // size].append(index % size)
    return [(chunk, tuple(rows)) for chunk, rows in found.items()]
