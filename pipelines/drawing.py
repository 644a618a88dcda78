"""How a model draws image i: the one place where settings become a call of the sampler."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from ddpm_core import GaussianDiffusion, UNet, noise, sample
from ddpm_core.checks import NotFiniteError
from ddpm_core.samplers import Callback
from pipelines.errors import Failed, UserError
from pipelines.sections import Sample

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are drawn; with the model, the identity of a job."""

    sampler: str
    steps: int
    eta: float
    spacing: str
    clip_x0: bool
    dynamic_threshold: float | None
    guidance: float
    seed: int
    chunk: int
    threads: int
    labels: tuple[int, ...] = ()
    """Classes that the images have in turn; none given: every class in turn."""
    class_counts: tuple[int, ...] = ()
    """Or images of each class that the classes are to be in proportion to, whatever the number of images."""
    device: str = "cpu"
    """Kind of device: another one draws other bits."""

    @staticmethod
    def of(fields: Sample, seed: int | None = None, class_counts: Sequence[int] | None = None) -> "Settings":
        """Those of a spec, with another seed where one is given; class_counts are those of the data.

        UserError where the classes are to be those of the data, and its are not known.
        """
        chosen = fields.model_dump(exclude={"n", "workers", "ema_length", "labels", "resources"})
        if fields.labels == "data" and not class_counts:
            raise UserError(
                "sample.labels: to match the data's classes, the data is needed: name an ingested dataset with classes"
            )
        given = () if isinstance(fields.labels, str) else tuple(fields.labels)
        counts = tuple(class_counts or ()) if fields.labels == "data" else ()
        seeded = {} if seed is None else {"seed": seed}
        return Settings(**{**chosen, **seeded}, labels=given, class_counts=counts, device=device_of(fields))

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> "Settings":
        """Those of a record that was kept as JSON. KeyError where it lacks one."""
        fields = {name: record[name] for name in Settings.__dataclass_fields__}
        return Settings(**{**fields, **{name: tuple(fields[name]) for name in ("labels", "class_counts")}})

    def labels_of(self, classes: int | None, indices: Sequence[int]) -> list[int] | None:
        """The class of each image of a job by a network that knows so many; None for one that knows none."""
        if classes is None:
            return None
        if self.labels:
            return [self.labels[index % len(self.labels)] for index in indices]
        if self.class_counts:
            return [_proportional(self.class_counts, index) for index in indices]
        return labels_of(classes, indices)

    def key(self, index: int) -> int:
        """The seed of image i of a job."""
        return noise.key(self.seed, "image", index)


def device_of(fields: Sample) -> str:
    """The kind of device that a spec has images drawn on."""
    return "cuda" if "GPU" in fields.resources else "cpu"


def labels_of(classes: int | None, indices: Sequence[int]) -> list[int] | None:
    """The class of each image, in turn, so that any number of images has them about equally often; None for a network
    without classes.
    """
    return None if classes is None else [index % classes for index in indices]


def _proportional(counts: Sequence[int], index: int) -> int:
    """A class for image i, such that the first n images have the classes about in proportion to counts, for every n:
    the fractional parts of i times the golden ratio fill the unit interval evenly."""
    place = (index * _GOLDEN) % 1.0 * sum(counts)
    return min(bisect_right(list(accumulate(counts)), place), len(counts) - 1)


def draw(
    process: GaussianDiffusion,
    unet: UNet,
    size: int,
    settings: Settings,
    indices: Sequence[int],
    seeds: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Images float32 [N, C, size, size] in about [-1, 1] for the indices of a job.

    Their seeds are the job's for these indices, unless others are given. Failed where the network answers NaN.
    """
    try:
        return sample(
            process,
            unet,
            shape=(unet.config.image_channels, size, size),
            seeds=[settings.key(index) for index in indices] if seeds is None else seeds,
            sampler=settings.sampler,
            steps=settings.steps,
            eta=settings.eta,
            spacing=settings.spacing,
            clip_x0=settings.clip_x0,
            dynamic_threshold=settings.dynamic_threshold,
            labels=settings.labels_of(unet.config.num_classes, indices),
            guidance=settings.guidance,
            callback=callback,
        )
    except NotFiniteError as error:
        raise Failed(f"nothing was drawn, {error}") from None
