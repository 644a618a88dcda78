"""The DDPM U-Net: residual blocks, each given the time, and self-attention at chosen levels.

Ho et al. 2020 (DDPM), appendix B, with the layout that diffusers' UNet2DModel gave it, parameter for parameter.
The first level works at full resolution, each further one at half the size of the one before. On the way down
every result is kept; on the way up each block takes the matching one as extra channels.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_core import noise

GROUP_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The network's shape. ValueError for one that cannot be built."""

    image_channels: int = 1
    channels: tuple[int, ...] = (32, 64)
    """Channels of each level, full resolution first."""
    blocks: int = 1
    """Residual blocks a level on the way down; one more on the way up."""
    attention: tuple[int, ...] = ()
    """Levels with self-attention after each residual block; 0 is full resolution."""
    mid_attention: bool = False
    """Self-attention between the two residual blocks at the lowest resolution."""
    head_channels: int | None = None
    """Channels of an attention head; None for one head, as in DDPM."""
    dropout: float = 0.0
    groups: int = 32
    """Groups of each normalisation; must divide every entry of `channels`."""

    def __post_init__(self) -> None:
        # A config read from JSON or YAML has lists.
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention", tuple(self.attention))
        if self.image_channels < 1 or self.blocks < 1 or self.groups < 1 or not self.channels:
            raise ValueError("image_channels, blocks and groups must be 1 or more, and channels must not be empty")
        if any(c < 1 or c % self.groups for c in self.channels):
            raise ValueError(f"groups ({self.groups}) must divide every entry of channels {list(self.channels)}")
        if self.channels[0] % 2:
            raise ValueError(f"the first entry of channels must be even (sine and cosine), not {self.channels[0]}")
        if not set(self.attention) <= set(range(len(self.channels))):
            raise ValueError(f"attention must name levels in 0..{len(self.channels) - 1}, not {list(self.attention)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.head_channels is not None:
            attended = [self.channels[i] for i in self.attention] + [self.channels[-1]] * self.mid_attention
            if self.head_channels < 1 or any(c % self.head_channels for c in attended):
                raise ValueError(f"head_channels ({self.head_channels}) must divide the attended channels {attended}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON or YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; ValueError for a field that there is not."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown U-Net fields {sorted(unknown)}; known are {sorted(known)}")
        return cls(**values)


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

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)
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

    def __init__(self, channels_in: int, channels_out: int, time_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = NormAct(groups, channels_in, eps=GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(time_channels, channels_out)  # applied by the U-Net, see UNet.time_shifts
        self.norm2 = NormAct(groups, channels_out, eps=GROUP_NORM_EPS)
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
    """A convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def time_embedding(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep, float32 [N, channels]: cosines, then sines (Vaswani et al. 2017, section 3.5)."""
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = timestep.float()[:, None] * exponent.exp()[None, :]
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def _first_weight(shape: torch.Size, name: str, seed: int) -> Tensor:
    """Glorot-uniform (bound sqrt(6 / (fan in + fan out))) or, for what ends a branch, zeros."""
    if name.rsplit(".", 1)[-1] in ("conv2", "out", "conv_out"):
        return torch.zeros(shape)
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * math.prod(shape[2:])))
    return noise.uniform([noise.key(seed, f"init/{name}")], shape.numel()).view(shape).mul_(2).sub_(1).mul_(bound)


class UNet(nn.Module):
    """UNet(config)(x, timestep) -> the same shape as x.

    The first weights are a function of (config, seed) alone, see `init_weights`. Dropout, while training, draws
    from torch's global generator: seed that for each forward pass.
    """

    def __init__(self, config: UNetConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        channels, time_channels = config.channels, 4 * config.channels[0]
        levels = range(len(channels))

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, time_channels, config.groups, config.dropout)

        def attention(channels: int) -> Attention:
            return Attention(channels, channels // (config.head_channels or channels), config.groups)

        def attention_at(level: int) -> nn.Module:
            return attention(channels[level]) if level in config.attention else nn.Identity()

        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.time_linear1 = nn.Linear(channels[0], time_channels)
        self.time_linear2 = nn.Linear(time_channels, time_channels)

        width = channels[0]
        skips = [width]  # channels of each result kept on the way down
        down = []
        for level in levels:
            blocks = []
            for _ in range(config.blocks):
                blocks.append(block(width, channels[level]))
                width = channels[level]
                skips.append(width)
            last = level == levels[-1]
            attentions = [attention_at(level) for _ in blocks]
            down.append(Level(blocks, attentions, nn.Identity() if last else Downsample(width)))
            if not last:
                skips.append(width)
        self.down = nn.ModuleList(down)

        middle = attention(width) if config.mid_attention else nn.Identity()
        self.middle = Level([block(width, width), block(width, width)], [middle, nn.Identity()], nn.Identity())

        up = []
        for level in reversed(levels):
            blocks = []
            for _ in range(config.blocks + 1):
                blocks.append(block(width + skips.pop(), channels[level]))
                width = channels[level]
            attentions = [attention_at(level) for _ in blocks]
            up.append(Level(blocks, attentions, Upsample(width) if level else nn.Identity()))
        self.up = nn.ModuleList(up)

        self.norm_out = NormAct(config.groups, width, eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew, each tensor keyed by (seed, its name).

        As in DDPM's code: Glorot-uniform weights, zero biases, and zero weights in the last convolution of each
        residual block, the last projection of each attention and the output convolution, so that at first every
        block passes its input on and the network answers 0.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_(_first_weight(module.weight.shape, name, seed))
                if module.bias is not None:
                    module.bias.zero_()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x [N, C, H, W], H and W divisible by 2^(levels - 1), else ValueError; timestep [N], counted from 0."""
        self._check(x)
        down, middle, up = self._levels()
        shift = iter(self.time_shifts(timestep.expand(len(x))))
        h = self.conv_in(x)
        skips = [h]
        for level in down:
            for block, attention in level.pairs():
                h = attention(block(h, next(shift)))
                skips.append(h)
            if isinstance(level.resample, Downsample):
                h = level.resample(h)
                skips.append(h)
        for block, attention in middle.pairs():
            h = attention(block(h, next(shift)))
        for level in up:
            for block, attention in level.pairs():
                h = attention(block(torch.cat((h, skips.pop()), dim=1), next(shift)))
            h = level.resample(h)
        return self.conv_out(self.norm_out(h))

    def time_shifts(self, timestep: Tensor) -> list[Tensor]:
        """What the time adds in each residual block, [N, its channels], in the order in which the blocks run.

        Computed in one place, so that all blocks' projections can become one product.
        """
        embedding = time_embedding(timestep, self.config.channels[0]).to(self.time_linear1.weight.dtype)
        embedding = F.silu(self.time_linear2(F.silu(self.time_linear1(embedding))))
        down, middle, up = self._levels()
        return [block.time(embedding) for level in (*down, middle, *up) for block, _ in level.pairs()]

    def _levels(self) -> tuple[list[Level], Level, list[Level]]:
        """Down, middle, up; typed, which a ModuleList is not."""
        return cast(list[Level], list(self.down)), self.middle, cast(list[Level], list(self.up))

    def _check(self, x: Tensor) -> None:
        factor = 2 ** (len(self.config.channels) - 1)
        channels = self.config.image_channels
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"images must be [N, {channels}, H, W] with H and W divisible by {factor}, not {list(x.shape)}"
            )
