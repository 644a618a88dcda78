"""From the spec's words to the objects of `ddpm_core`."""

from typing import TYPE_CHECKING, Any

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig
from pipelines.sections import Data, Diffusion, Model

if TYPE_CHECKING:
    from pipelines.spec import Spec


def build_schedule(diffusion: Diffusion) -> NoiseSchedule:
    """The noise schedule of a spec."""
    options: dict[str, Any] = diffusion.schedule.model_dump()
    make = getattr(NoiseSchedule, options.pop("kind"))
    return make(diffusion.timesteps, **options)


def build_process(diffusion: Diffusion) -> GaussianDiffusion:
    """The diffusion process of a spec."""
    return GaussianDiffusion(build_schedule(diffusion), predict=diffusion.predict, variance=diffusion.variance)


def build_config(model: Model, data: Data) -> UNetConfig:
    """The U-Net's shape."""
    return UNetConfig(
        image_channels=data.channels,
        channels=tuple(model.channels),
        blocks=model.blocks,
        attention=tuple(model.attention),
        mid_attention=model.mid_attention,
        head_channels=model.head_channels,
        dropout=model.dropout,
        groups=model.groups,
    )


def build_model(spec: "Spec") -> UNet:
    """The U-Net of a spec, its weights initialised from the spec's seed."""
    return UNet(build_config(spec.model, spec.data), spec.seed)
