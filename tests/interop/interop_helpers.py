"""Networks of diffusers and of ours for the tests, and the published configurations."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from ddpm_core import NoiseSchedule, UNet, UNetConfig, noise
from pipelines.interop import Portable

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# The published checkpoints' own words: google/ddpm-cifar10-32, and google/ddpm-{celebahq,church,bedroom,cat}-256.
PUBLISHED = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
CIFAR10 = PUBLISHED | {
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "sample_size": 32,
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
LARGE = PUBLISHED | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "sample_size": 256,
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
DIGITS = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "add_attention": False,
}
FASHION = DIGITS | {
    "sample_size": 28,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "add_attention": True,
}
NARROW = {"block_out_channels": [32, 64, 64, 64]}
SMALL = UNetConfig(channels=(16, 16), groups=8, attention=(1,), mid_attention=True, head_channels=8)


def theirs(**config: Any) -> UNet2DModel:
    """diffusers' network with random weights, its norms moved from where they start."""
    torch.manual_seed(0)
    model = UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(folder: Path, unet: UNet2DModel, scheduler: Any = None) -> Path:
    """A folder as diffusers itself writes it."""
    DDPMPipeline(unet, scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


def portable(config: UNetConfig = SMALL, predict: str = "eps", **fields: Any) -> Portable:
    """A network of ours whose zero-initialised ends have moved."""
    weights = {
        name: value + 0.05 * noise.normal([noise.key(1, name)], tuple(value.shape))[0]
        for name, value in UNet(config).state_dict().items()
    }
    defaults: dict[str, Any] = {"schedule": NoiseSchedule.linear(), "variance": "small", "image_size": 8}
    return Portable(config=config, weights=weights, predict=predict, **{**defaults, **fields})


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_equal_outputs(ours: UNet, other: UNet2DModel, size: int, labels: Tensor | None = None) -> None:
    x, timestep = draw(3, ours.config.image_channels, size, size), torch.tensor([0, 42, 999])
    with torch.inference_mode():
        expected = other.eval()(x, timestep, class_labels=labels).sample
        got = ours(x, timestep, labels)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
