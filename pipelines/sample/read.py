"""Finished jobs, read back."""

from collections.abc import Iterator

import numpy as np

from pipelines.errors import UserError
from pipelines.sample.finish import Samples
from pipelines.sample.job import job_at
from pipelines.store import DamageError, Place


def read_samples(samples: Samples, n: int) -> Iterator[np.ndarray]:
    """The first n images of a finished job, in index order, uint8 [<=chunk, H, W, C] at a time."""
    return job_at(Place.of(samples.out)).read(n)


def holds_samples(place: Place, n: int) -> bool:
    """Whether the first n images of a job lie in a place."""
    try:
        return job_at(place).holds(n)
    except (DamageError, FileNotFoundError, UserError):  # another version's, say
        return False
