"""Finished jobs, read back."""

from collections.abc import Iterator

import numpy as np

from pipelines.sample.finish import Samples
from pipelines.sample.job import MANIFEST, job_at
from pipelines.store import Place


def read_samples(samples: Samples, n: int) -> Iterator[np.ndarray]:
    """The first n images of a finished job, in index order, uint8 [<=chunk, H, W, C] at a time."""
    return job_at(Place.of(samples.out)).read(n)


def holds_samples(place: Place, n: int) -> bool:
    """Whether a finished job lies in a place, with its first n images."""
    return (place / MANIFEST).exists() and job_at(place).holds(n)
