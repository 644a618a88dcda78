"""What is done with a trained model: samples, scores, gates."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from pipelines.sections.base import Fraction, Section


class Sample(Section):
    n: PositiveInt = 1000
    seed: int = 0
    ema_length: Literal["live"] | Annotated[float, Field(gt=0, lt=0.288)] | None = None
    """Length (sigma_rel) of the average that is drawn with, made of the snapshots of `train.ema_profiles`; by default
    the one by half-life. "live" is no average: the weights as they were trained."""
    sampler: Literal["ddim", "ancestral", "dpmpp_2m"] = "ddim"
    steps: PositiveInt = 50
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    spacing: Literal["trailing", "linspace", "leading"] = "trailing"
    """Which of the timesteps are taken; "trailing" begins at the last one, where nothing but noise is left."""
    clip_x0: bool = True
    dynamic_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Quantile of each image's predicted values to clip at, instead of at 1."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """How far a class-conditional model is steered towards the class; 1 is not at all."""
    chunk: PositiveInt = 100
    """Images computed together; part of the job's identity."""
    labels: Literal["uniform", "data"] | Annotated[list[NonNegativeInt], Field(min_length=1)] = "uniform"
    """Classes of the images: every one in turn, in proportion to those of the training images, or these in turn."""
    workers: PositiveInt = 1
    """Most processes that draw at a time; the images do not depend on it."""
    threads: PositiveInt = 1
    """CPUs and torch threads of each; part of the job's identity."""
    resources: dict[str, PositiveFloat] = {}
    """Ray resources of each, beside its CPUs; `memory` in bytes. With a GPU, or a share of one, it draws on that."""

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        if "CPU" in resources:
            raise ValueError("sample.resources: CPU is said by sample.threads")
        if resources.get("GPU", 1) > 1:
            raise ValueError("sample.resources: a process draws on one GPU; more sample.workers use more of them")
        if taken := resources.keys() & {"object_store_memory", "bundle"}:
            raise ValueError(f"sample.resources: {', '.join(sorted(taken))} is Ray's own")
        return resources


class Evaluate(Section):
    samples: Annotated[int, Field(ge=6)] | None = None
    """Images that a model draws to be scored, at most half as many as are held out; by default so many."""
    keep_samples: bool = True
    """Keep them, so that `sample` need not draw them again; else they are looked at and forgotten."""
    inception: str | None = None
    """A file with InceptionV3's weights, for features as in the literature; by default a small network of the data."""
    feature_width: Annotated[int, Field(ge=2, le=64)] = 64
    feature_epochs: PositiveInt = 30
    """Passes of the feature network over the training images."""
    bits_images: Annotated[int, Field(ge=2)] = 256
    """Held-out images whose bits/dim is estimated."""
    bits_timesteps: Annotated[int, Field(ge=2)] = 8
    """Timesteps evaluated for each of them."""
    exact: bool = False
    """Evaluate every timestep of each of them instead."""


class Gates(Section):
    """What a model must show before it becomes `champion`."""

    frechet_over_floor: PositiveFloat = 2.0
    """Largest Frechet distance, in units of the real-against-real floor at the same n."""
    feature_accuracy: Fraction = 0.95
    """Least held-out accuracy of a feature network that was trained on classes, or its score means nothing."""
    noise_over_floor: PositiveFloat = 50.0
    """Asked instead of one that knows none: least Frechet distance of noise, in floors."""
