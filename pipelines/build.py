"""From the spec's words to the objects of `ddpm_core`."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, losses
from ddpm_core.diffusion import Network
from pipelines import sections
from pipelines.sections import Data, Diffusion, Model, Train

if TYPE_CHECKING:
    from pipelines.spec import Spec

Loss = Callable[[GaussianDiffusion, Network, Tensor, Tensor, Tensor], Tensor]
"""(process, model, x0, t, eps) -> [N]."""


def build_schedule(diffusion: Diffusion) -> NoiseSchedule:
    """The noise schedule of a spec. ValueError for one that cannot be."""
    match diffusion.schedule:
        case sections.Betas(values=values) | sections.AlphaBars(values=values) if len(values) != diffusion.timesteps:
            raise ValueError(f"schedule.values has {len(values)} numbers, but timesteps is {diffusion.timesteps}")
        case sections.Betas(values=betas):
            schedule = NoiseSchedule.from_betas(betas)
        case sections.AlphaBars(values=alpha_bars):
            schedule = NoiseSchedule.from_alpha_bars(alpha_bars)
        case sections.Rates(min_signal_rate=low, max_signal_rate=high):
            schedule = NoiseSchedule.from_rates(diffusion.timesteps, low, high)
        case by_name:
            options: dict[str, Any] = by_name.model_dump()
            schedule = getattr(NoiseSchedule, options.pop("kind"))(diffusion.timesteps, **options)
    return schedule.rescale_zero_terminal() if diffusion.zero_terminal else schedule


def build_process(diffusion: Diffusion) -> GaussianDiffusion:
    """The diffusion process of a spec. ValueError for a combination that means nothing."""
    process = GaussianDiffusion(build_schedule(diffusion), predict=diffusion.predict, variance=diffusion.variance)
    if process.needs_float64:  # networks here compute in float32
        raise ValueError(
            f"{diffusion.predict} says nothing about x0 where the schedule ends, at alpha_bar = "
            f"{process.schedule.alpha_bar[-1].item():.0e}, which float32 cannot hold: predict v or x0, or keep more "
            "signal"
        )
    return process


def build_loss(train: Train) -> Loss:
    """What is minimised."""
    match train.weighting:
        case sections.MinSnr(gamma=gamma):
            weighting = losses.min_snr(gamma)
        case sections.P2(gamma=gamma, k=k):
            weighting = losses.p2(gamma, k)
        case _:
            weighting = losses.uniform
    match train.loss:
        case "mean_matching":
            return losses.mean_matching
        case "vlb":
            return losses.vlb
        case "hybrid":
            return partial(losses.hybrid, weighting=weighting)
        case _:
            return partial(GaussianDiffusion.loss, weighting=weighting)


def build_config(model: Model, data: Data, diffusion: Diffusion) -> UNetConfig:
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
        num_classes=model.classes,
        null_class=model.null_class,
        norm_eps=model.norm_eps,
        time_sine_first=model.time_sine_first,
        time_frequency_shift=model.time_frequency_shift,
        asymmetric_downsample=model.asymmetric_downsample,
        learned_variance=diffusion.variance == "learned_range",
    )


def build_model(spec: "Spec") -> UNet:
    """The U-Net of a spec, its weights initialised from the spec's seed."""
    return UNet(build_config(spec.model, spec.data, spec.diffusion), spec.seed)
