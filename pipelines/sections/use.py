"""What is done with a trained model: samples, scores, gates."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.sections.base import Fraction, Section


class Sample(Section):
    n: PositiveInt = 1000
    seed: int = 0
    ema_length: Annotated[float, Field(gt=0, lt=0.288)] | None = None
    """Length (sigma_rel) of the average that is drawn with, made of the snapshots of `train.ema_profiles`; by default
    the one by half-life."""
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
    workers: PositiveInt = 1
    threads: PositiveInt = 1


class Evaluate(Section):
    feature_width: Annotated[int, Field(ge=2, le=64)] = 64
    feature_epochs: PositiveInt = 30
    """Passes of the feature network over the training images."""
    bits_images: Annotated[int, Field(ge=2)] = 256
    """Held-out images whose bits/dim is estimated."""
    bits_timesteps: Annotated[int, Field(ge=2)] = 8
    """Timesteps evaluated for each of them."""


class Gates(Section):
    """What a model must show before it becomes `champion`."""

    frechet_over_floor: PositiveFloat = 2.0
    """Largest Frechet distance, in units of the real-against-real floor at the same n."""
    feature_accuracy: Fraction = 0.95
    """Least held-out accuracy of the feature network, or its score means nothing."""
