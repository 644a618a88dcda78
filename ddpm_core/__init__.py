"""Denoising diffusion: schedules, process, network, losses, samplers, likelihood."""

from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.ema import Ema, ema_decay
from ddpm_core.likelihood import bits_per_dim, bits_per_dim_estimate, content_keys, mean_interval
from ddpm_core.samplers import sample
from ddpm_core.schedule import NoiseSchedule
from ddpm_core.unet import UNet, UNetConfig

__all__ = [
    "Ema",
    "GaussianDiffusion",
    "NoiseSchedule",
    "UNet",
    "UNetConfig",
    "bits_per_dim",
    "bits_per_dim_estimate",
    "content_keys",
    "ema_decay",
    "mean_interval",
    "sample",
]
