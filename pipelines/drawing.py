"""How a model draws image i: the one place where settings become a call of the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpm_core import GaussianDiffusion, UNet, noise, sample
from ddpm_core.checks import NotFiniteError
from ddpm_core.samplers import Callback
from pipelines.errors import Failed
from pipelines.sections import Sample


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

    @staticmethod
    def of(fields: Sample, seed: int | None = None) -> "Settings":
        """Those of a spec, with another seed where one is given."""
        chosen = fields.model_dump(exclude={"n", "workers", "ema_length"})
        return Settings(**{**chosen, **({} if seed is None else {"seed": seed})})

    def key(self, index: int) -> int:
        """The seed of image i of a job."""
        return noise.key(self.seed, "image", index)


def labels_of(unet: UNet, indices: Sequence[int]) -> list[int] | None:
    """The class of each image, in turn, so that any number of images has them about equally often; None for a network
    without classes.
    """
    classes = unet.config.num_classes
    return None if classes is None else [index % classes for index in indices]


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
            labels=labels_of(unet, indices),
            guidance=settings.guidance,
            callback=callback,
        )
    except NotFiniteError as error:
        raise Failed(f"nothing was drawn, {error}") from None
