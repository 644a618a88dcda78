"""The images."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipelines.sections.base import Section


class LocalCache(Section):
    folder: str
    """On a local disk of each host that trains."""
    gib: PositiveFloat = 50.0
    """Largest size; the shards that were not used for longest make room."""


class Data(Section):
    source: str
    """`digits` (bundled), the path of images (a folder, whose class folders become labels, zip, tar, Parquet, IDX, npz,
    npy or CIFAR), or a dataset that was made before, by `ddpm ingest` or `ddpm data index`, also on S3."""
    image_size: Annotated[int, Field(ge=8)]
    """Side of the square images, pixels."""
    channels: Literal[1, 3] = 1
    resize: Literal["auto", "area", "lanczos"] = "auto"
    """Area averaging or Lanczos; auto is area where an image shrinks, Lanczos where it grows."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the images kept from training, chosen by a hash of their content; a split that the source has is kept
    instead."""
    drop_duplicates: bool = False
    """Keep one of images with the same pixels."""
    shard_images: PositiveInt = 1000
    """Images a shard."""
    workers: PositiveInt | None = None
    """Ray tasks that ingest at a time; by default one a CPU. The result does not depend on it."""
    window: PositiveInt = 4
    """Consecutive shards whose images are shuffled together."""
    flip: bool = False
    """Mirror half of the training images, keyed by slot."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Move each training image by up to so many pixels along each axis, keyed by slot; its edge is repeated."""
    on_error: Literal["raise", "skip"] = "raise"
    """At a damaged training image stop, naming it, or read the next whole one instead, which is recorded in the run."""
    cache: LocalCache | None = None
    """Whole shards of a dataset on S3, kept on local disk; by default images are read from there one by one."""

    @model_validator(mode="after")
    def _shift_stays_inside(self) -> "Data":
        if self.shift >= self.image_size:
            raise ValueError(f"data.shift: {self.shift} pixels leave nothing of an image of {self.image_size}")
        return self
