"""The DDPM U-Net: residual blocks, each given the time, and self-attention at chosen levels.

Ho et al. 2020 (DDPM), appendix B, with the layout that diffusers' UNet2DModel gave it, parameter for parameter.
The first level works at full resolution, each further one at half the size of the one before. On the way down
every result is kept; on the way up each block takes the matching one as extra channels.
"""

import contextlib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_core import noise
from ddpm_core.checks import check_images
from ddpm_core.unet_blocks import Attention, Downsample, Level, NormAct, ResidualBlock, Upsample, time_embedding


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
    num_classes: int | None = None
    """Classes that images can be asked of; None for a network that knows none."""
    null_class: bool = True
    """Whether, beside the classes, label `num_classes` stands for none of them, which classifier-free guidance needs
    (Ho and Salimans 2022). Means nothing without `num_classes`."""
    learned_variance: bool = False
    """Twice the output channels: what is predicted, then what chooses the variance (Nichol and Dhariwal 2021,
    section 3.1)."""

    # Where networks trained by others differ. DDPM's own code has 1e-6, True, 1 and True here.
    norm_eps: float = 1e-5
    """Added to the variance in each normalisation."""
    time_sine_first: bool = False
    """Sines before cosines in the time embedding."""
    time_frequency_shift: int = 0
    """See `time_embedding`."""
    asymmetric_downsample: bool = False
    """Zeros to the right and at the bottom only before each strided convolution, instead of all around."""

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
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, or None, not {self.num_classes}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be above 0, not {self.norm_eps}")
        if not 0 <= self.time_frequency_shift < self.channels[0] // 2:
            raise ValueError(
                "time_frequency_shift must be 0 or more and below half of the first entry of channels "
                f"({self.channels[0]}), not {self.time_frequency_shift}"
            )

    @property
    def label_count(self) -> int:
        """How many labels the network tells apart, the null class included; 0 without classes."""
        return 0 if self.num_classes is None else self.num_classes + self.null_class

    @property
    def output_channels(self) -> int:
        return self.image_channels * (2 if self.learned_variance else 1)

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


def _first_weight(shape: torch.Size, name: str, seed: int) -> Tensor:
    """Glorot-uniform (bound sqrt(6 / (fan in + fan out))) or, for what ends a branch, zeros."""
    if name.rsplit(".", 1)[-1] in ("conv2", "out", "conv_out"):
        return torch.zeros(shape)
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * math.prod(shape[2:])))
    return noise.uniform([noise.key(seed, f"init/{name}")], shape.numel()).view(shape).mul_(2).sub_(1).mul_(bound)


class UNet(nn.Module):
    """UNet(config)(x, timestep, labels) -> the shape of x, with twice the channels for a learned variance.

    The first weights are a function of (config, seed) alone, see `init_weights`; seed None leaves them as torch made
    them, for a network that is about to be loaded. Dropout, while training, draws from torch's global generator:
    seed that for each forward pass.
    """

    def __init__(self, config: UNetConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        channels, time_channels = config.channels, 4 * config.channels[0]
        levels = range(len(channels))

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            norm_eps, dropout = config.norm_eps, config.dropout
            return ResidualBlock(channels_in, channels_out, time_channels, config.groups, norm_eps, dropout)

        def attention(channels: int) -> Attention:
            heads = channels // (config.head_channels or channels)
            return Attention(channels, heads, config.groups, config.norm_eps)

        def attention_at(level: int) -> nn.Module:
            return attention(channels[level]) if level in config.attention else nn.Identity()

        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.time_linear1 = nn.Linear(channels[0], time_channels)
        self.time_linear2 = nn.Linear(time_channels, time_channels)
        self.class_embedding = nn.Embedding(config.label_count, time_channels) if config.label_count else None

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
            resample = nn.Identity() if last else Downsample(width, config.asymmetric_downsample)
            down.append(Level(blocks, attentions, resample))
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

        self.norm_out = NormAct(config.groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.output_channels, 3, padding=1)
        if seed is not None:
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
            elif isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                module.weight.copy_(_first_weight(module.weight.shape, name, seed))
                if not isinstance(module, nn.Embedding) and module.bias is not None:
                    module.bias.zero_()

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], H and W divisible by 2^(levels - 1); timestep [N], counted from 0; labels int64 [N], each
        a class or the null class, for a network with classes and for no other. Else ValueError.

        Under autocast the last convolution is in float32 all the same: what an output stands for can magnify its error
        thousands of times.
        """
        self._check(x, timestep)
        self._check_labels(labels, len(x))
        down, middle, up = self._levels()
        shift = iter(self.time_shifts(timestep.expand(len(x)), labels))
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
        device = h.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            return self.conv_out(self.norm_out(h.to(self.conv_out.weight.dtype)))

    def time_shifts(self, timestep: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """What the time, and the class, add in each residual block, [N, its channels], in the blocks' order.

        Computed in one place, so that all blocks' projections can become one product.
        """
        config = self.config
        waves = time_embedding(timestep, config.channels[0], config.time_sine_first, config.time_frequency_shift)
        embedding = self.time_linear2(F.silu(self.time_linear1(waves.to(self.time_linear1.weight.dtype))))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(labels)
        embedding = F.silu(embedding)
        down, middle, up = self._levels()
        return [block.time(embedding) for level in (*down, middle, *up) for block, _ in level.pairs()]

    def _levels(self) -> tuple[list[Level], Level, list[Level]]:
        """Down, middle, up; typed, which a ModuleList is not."""
        return cast(list[Level], list(self.down)), self.middle, cast(list[Level], list(self.up))

    def _check(self, x: Tensor, timestep: Tensor) -> None:
        factor = 2 ** (len(self.config.channels) - 1)
        channels = self.config.image_channels
        check_images(x)
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"images must be [N, {channels}, H, W] with H and W divisible by {factor}, not {list(x.shape)}"
            )
        if timestep.shape not in ((), (1,), (len(x),)):
            raise ValueError(f"one timestep an image is needed, [{len(x)}], not {list(timestep.shape)}")

    def _check_labels(self, labels: Tensor | None, n: int) -> None:
        count = self.config.label_count
        if not count:
            if labels is not None:
                raise ValueError("labels were given, but this network has no classes")
            return
        if labels is None or labels.dtype != torch.int64 or labels.shape != (n,):
            given = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"this network has classes: labels must be int64 [{n}], not {given}")
        low, high = (int(bound) for bound in labels.aminmax()) if n else (0, 0)
        if low < 0 or high >= count:
            null = f", where {self.config.num_classes} stands for no class" if self.config.null_class else ""
            raise ValueError(f"labels must lie in 0..{count - 1}{null}, not in {low}..{high}")
