"""The parts of the U-Net: time embedding, normalisation with activation, attention, residual blocks, resampling."""

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormAct(nn.GroupNorm):
    """silu(group_norm(x + shift)): the seam behind which a fused kernel can stand."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """x [N, C, H, W]; shift [N, C] is added to every pixel."""
        if shift is not None:
            x = x + shift[:, :, None, None]
        return F.silu(super().forward(x))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for [N, heads, tokens, D]: the seam for a faster attention."""
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, heads: int, groups: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps=norm_eps)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, H W, C]

        def heads(projection: nn.Linear) -> Tensor:
            return projection(tokens).view(n, height * width, self.heads, -1).transpose(1, 2)

        mixed = attend(heads(self.query), heads(self.key), heads(self.value))
        mixed = self.out(mixed.transpose(1, 2).reshape(n, height * width, channels))
        return x + mixed.transpose(1, 2).view_as(x)


class ResidualBlock(nn.Module):
    """Two normalised, activated convolutions around a shift by the time; the input is added back."""

    def __init__(
        self, channels_in: int, channels_out: int, time_channels: int, groups: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = NormAct(groups, channels_in, eps=norm_eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(time_channels, channels_out)  # applied by the U-Net, see UNet.time_shifts
        self.norm2 = NormAct(groups, channels_out, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """x [N, C_in, H, W], shift [N, C_out] -> [N, C_out, H, W]."""
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.dropout(self.norm2(h, shift)))
        return self.shortcut(x) + h


class Level(nn.Module):
    """The blocks of one resolution, an attention (or nothing) after each, and the way to the next resolution."""

    def __init__(self, blocks: list[ResidualBlock], attentions: list[nn.Module], resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def pairs(self) -> Iterator[tuple[ResidualBlock, nn.Module]]:
        """Each block with what follows it."""
        return zip(cast(list[ResidualBlock], self.blocks), self.attentions, strict=True)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """A convolution with stride 2; the border of zeros is on all four sides or, asymmetric, right and bottom."""

    def __init__(self, channels: int, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


def time_embedding(timestep: Tensor, channels: int, sine_first: bool = False, frequency_shift: int = 0) -> Tensor:
    """Sinusoids of the timestep, float32 [N, channels]: cosines, then sines, or the other way round.

    Frequency i is 10000^(-i / (channels/2 - frequency_shift)) (Vaswani et al. 2017, section 3.5, has no shift;
    DDPM's code has 1, so that the last frequency is 1/10000).
    """
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device)
    exponent = exponent / (half - frequency_shift)
    angle = timestep.float()[:, None] * exponent.exp()[None, :]
    waves = (angle.sin(), angle.cos()) if sine_first else (angle.cos(), angle.sin())
    return torch.cat(waves, dim=1)
