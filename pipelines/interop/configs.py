"""diffusers' two configuration files, field by field: what they may say here, for reading and for writing.

A field's default is diffusers' own, for files leave out what came after them. A field that is not here, or a value
that its type does not allow, cannot be honoured: a UserError names it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from ddpm_core import NoiseSchedule, UNetConfig
from pipelines.errors import UserError

VERSION = "0.42.1"
"""The diffusers whose words are written."""

_PREDICT = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCE = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned_range"}

_NO_CAP = 1e6
"""A threshold that no prediction of an image exceeds."""

_One = Annotated[float, Field(ge=1, le=1)]
_Down = Literal["DownBlock2D", "AttnDownBlock2D"]
_Up = Literal["UpBlock2D", "AttnUpBlock2D"]
_Pair = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


class _File(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    diffusers_version: str = Field(VERSION, alias="_diffusers_version")


class UNetFile(_File):
    """`unet/config.json`."""

    class_name: Literal["UNet2DModel"] = Field("UNet2DModel", alias="_class_name")
    null_class: int | None = Field(None, alias="_null_class")
    """Our own note, which diffusers passes over: the row of the class embedding that stands for no class."""
    sample_size: PositiveInt | _Pair
    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    center_input_sample: Literal[False] = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: PositiveInt | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: list[_Down] = ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    up_block_types: list[_Up] = ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    block_out_channels: list[PositiveInt] = [224, 448, 672, 896]
    layers_per_block: PositiveInt = 2
    mid_block_scale_factor: _One = 1
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv"] = "conv"
    upsample_type: Literal["conv"] = "conv"
    dropout: float = 0.0
    act_fn: Literal["silu", "swish"] = "silu"
    attention_head_dim: PositiveInt | None = 8
    """Channels of a head; null for one head."""
    norm_num_groups: PositiveInt = 32
    attn_norm_num_groups: PositiveInt | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default"] = "default"
    add_attention: bool = True
    """In the middle."""
    class_embed_type: Literal[None] = None
    num_class_embeds: PositiveInt | None = None
    num_train_timesteps: int | None = None
    """Of a learned time embedding, which this is not."""

    @classmethod
    def of(cls, config: UNetConfig, image_size: int) -> Self:
        """What the file says of our network."""
        attended = [level in config.attention for level in range(len(config.channels))]
        has_null = config.num_classes is not None and config.null_class
        return cls.model_validate(
            {
                "sample_size": image_size,
                "in_channels": config.image_channels,
                "out_channels": config.output_channels,
                "freq_shift": config.time_frequency_shift,
                "flip_sin_to_cos": not config.time_sine_first,
                "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
                "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
                "block_out_channels": list(config.channels),
                "layers_per_block": config.blocks,
                "downsample_padding": 0 if config.asymmetric_downsample else 1,
                "dropout": config.dropout,
                "attention_head_dim": config.head_channels,
                "norm_num_groups": config.groups,
                "norm_eps": config.norm_eps,
                "add_attention": config.mid_attention,
                "num_class_embeds": config.label_count or None,
                "_null_class": config.num_classes if has_null else None,
            }
        )

    def to_config(self) -> UNetConfig:
        """Our network of that shape. ValueError for one that ours cannot have."""
        channels, labels = self.block_out_channels, self.num_class_embeds
        attended = [kind == "AttnDownBlock2D" for kind in self.down_block_types]
        if not len(channels) == len(attended) == len(self.up_block_types):
            raise ValueError("block_out_channels, down_block_types and up_block_types must be of the same length")
        if attended != [kind == "AttnUpBlock2D" for kind in reversed(self.up_block_types)]:
            raise ValueError("up_block_types: attention must be at the levels where down_block_types has it")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(f"out_channels: must be in_channels ({self.in_channels}) or twice that")
        if self.time_embedding_dim not in (None, 4 * channels[0]):
            raise ValueError("time_embedding_dim: must be four times the first of block_out_channels")
        if self.attn_norm_num_groups not in (None, self.norm_num_groups):
            raise ValueError(f"attn_norm_num_groups: must be norm_num_groups ({self.norm_num_groups})")
        if self.null_class is not None and (labels is None or self.null_class != labels - 1):
            raise ValueError(f"_null_class: must be the last of num_class_embeds ({labels})")
        return UNetConfig(
            image_channels=self.in_channels,
            channels=tuple(channels),
            blocks=self.layers_per_block,
            attention=tuple(level for level, has in enumerate(attended) if has),
            mid_attention=self.add_attention,
            head_channels=self.attention_head_dim,
            dropout=self.dropout,
            groups=self.norm_num_groups,
            num_classes=labels if self.null_class is None else self.null_class,
            null_class=labels is None or self.null_class is not None,
            learned_variance=self.out_channels != self.in_channels,
            norm_eps=self.norm_eps,
            time_sine_first=not self.flip_sin_to_cos,
            time_frequency_shift=self.freq_shift,
            asymmetric_downsample=self.downsample_padding == 0,
        )

    def image_size(self) -> int:
        """Side of the images, pixels. ValueError where they are not square."""
        sides = {self.sample_size} if isinstance(self.sample_size, int) else set(self.sample_size)
        if len(sides) > 1:
            raise ValueError(f"sample_size: images must be square, not {self.sample_size}")
        return sides.pop()


class SchedulerFile(_File):
    """`scheduler/scheduler_config.json`, of a DDPMScheduler or a DDIMScheduler."""

    class_name: Literal["DDPMScheduler", "DDIMScheduler"] = Field("DDPMScheduler", alias="_class_name")
    num_train_timesteps: PositiveInt = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    trained_betas: list[float] | None = None
    """If given, the schedule, whatever the fields above say."""
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "learned_range"] = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: _One = 1.0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: bool = False
    """By `dynamic_thresholding_ratio`, instead of clipping to 1; the threshold is at most `sample_max_value`."""
    dynamic_thresholding_ratio: Annotated[float, Field(gt=0, le=1)] = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    steps_offset: Literal[0] = 0
    rescale_betas_zero_snr: bool = False

    # Of the DDIMScheduler alone, and of versions before 0.7: read, not written.
    set_alpha_to_one: Literal[True] = True
    predict_epsilon: Literal[True] = True
    tensor_format: str | None = None

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        predict: str,
        variance: str,
        clip_x0: bool,
        dynamic_threshold: float | None,
        spacing: str,
    ) -> Self:
        """What the file says of our process: any schedule by its betas. UserError for what it cannot say."""
        predictions, variances = ({ours: theirs for theirs, ours in names.items()} for names in (_PREDICT, _VARIANCE))
        if predict not in predictions:
            raise UserError(
                f"diffusion.predict: the diffusers format cannot say {predict}, only {', '.join(predictions)}"
            )
        if schedule.original_timesteps[-1] != schedule.timesteps:
            raise UserError("the diffusers format holds the schedule that was trained on, not a respaced one")
        _check_drawable(schedule, predict)
        threshold: dict[str, Any] = {}
        if dynamic_threshold is not None:
            threshold = {"dynamic_thresholding_ratio": dynamic_threshold, "sample_max_value": _NO_CAP}
        return cls.model_validate(
            {
                "num_train_timesteps": schedule.timesteps,
                "trained_betas": schedule.beta.tolist(),
                "variance_type": variances[variance],
                "clip_sample": clip_x0,
                "prediction_type": predictions[predict],
                "timestep_spacing": spacing,
                "thresholding": dynamic_threshold is not None,
            }
            | threshold
        )

    def dynamic_threshold(self) -> float | None:
        """The quantile to clip at, None for clipping to 1 or not at all. ValueError for a capped one."""
        if self.thresholding and self.sample_max_value < _NO_CAP:
            raise ValueError(f"sample_max_value: {self.sample_max_value} caps the threshold, which has no cap here")
        return self.dynamic_thresholding_ratio if self.thresholding else None

    @property
    def predict(self) -> str:
        return _PREDICT[self.prediction_type]

    @property
    def variance(self) -> str:
        # With the suffix it takes a detour through the logarithm, to the same number.
        return _VARIANCE[self.variance_type.removesuffix("_log")]

    def to_schedule(self) -> NoiseSchedule:
        """The noise schedule, in float64 (diffusers has it in float32). ValueError for one that is none."""
        timesteps, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            if len(self.trained_betas) != timesteps:
                raise ValueError(f"trained_betas: num_train_timesteps ({timesteps}) are needed")
            schedule = _from_betas(self.trained_betas)
        elif self.beta_schedule == "linear":
            schedule = NoiseSchedule.linear(timesteps, start, end)
        elif self.beta_schedule == "scaled_linear":
            schedule = NoiseSchedule.quadratic(timesteps, start, end)
        elif self.beta_schedule == "squaredcos_cap_v2":
            schedule = NoiseSchedule.cosine(timesteps)
        else:  # "sigmoid" has beta, not alpha_bar, along a sigmoid
            share = torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid()
            schedule = NoiseSchedule.from_betas(start + share * (end - start))
        return schedule.rescale_zero_terminal() if self.rescale_betas_zero_snr else schedule


def _check_drawable(schedule: NoiseSchedule, predict: str) -> None:
    """UserError where diffusers, which has alpha_bar in float32, would draw NaN.

    Zero at T alone, as in a zero-terminal schedule, does no harm to x0 and v. For eps it divides by its root; and of
    two timesteps with a zero, it divides one by the other.
    """
    gone = ((1 - schedule.beta.float()).cumprod(0) == 0).nonzero().flatten() + 1
    if len(gone) > 1 or (len(gone) and predict == "eps"):
        remedy = "keep more signal at the end" if len(gone) > 1 else "predict v or x0, or keep more signal at T"
        raise UserError(
            f"diffusion.schedule: alpha_bar from t = {gone[0]} on is 0 in float32, which is what diffusers computes "
            f"in: with diffusion.predict {predict} it would draw NaN; {remedy}"
        )


def _from_betas(betas: list[float]) -> NoiseSchedule:
    if betas[-1] != 1 or len(betas) == 1:
        return NoiseSchedule.from_betas(betas)
    alpha_bar = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    return NoiseSchedule.from_alpha_bars(before_rescaling(alpha_bar)).rescale_zero_terminal()


def before_rescaling(alpha_bar: Tensor) -> Tensor:
    """Of what `rescale_zero_terminal` makes this zero-terminal alpha_bar [T].

    A schedule gets to 0 by rescaling alone; where next to nothing is left at T, that moves nothing else but for a hair.
    """
    return torch.cat((alpha_bar[:-1], 1e-30 * alpha_bar[-2:-1]))


def dump(file: UNetFile | SchedulerFile) -> bytes:
    """The file as diffusers reads it."""
    unwritten = {"set_alpha_to_one", "predict_epsilon", "tensor_format"}
    values = file.model_dump(mode="json", by_alias=True, exclude=unwritten)
    return dump_json({k: v for k, v in values.items() if not (k == "_null_class" and v is None)})


def dump_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


FileT = TypeVar("FileT", bound=_File)
ResultT = TypeVar("ResultT")


def parse(kind: type[FileT], path: Path) -> FileT:
    """A file, validated; UserError names the first field that cannot be honoured."""
    known = {field.alias or name for name, field in kind.model_fields.items()}
    fields = {
        name: value
        for name, value in read_json(path).items()
        if name in known or not (name.startswith("_") or value is None)  # null: a setting that is not set
    }
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field, given, reason = problem["loc"][0], shortened(problem["input"]), problem["msg"]
    if problem["type"] == "missing":
        raise UserError(f"{path}: {field}: is missing")
    if problem["type"] == "extra_forbidden":
        raise UserError(f"{path}: {field}: a setting that is not known here, so {given} cannot be honoured")
    raise UserError(f"{path}: {field}: {given} cannot be honoured ({reason[0].lower()}{reason[1:]})")


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; UserError where it is missing or anything else."""
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds no fields")
    return fields


def told(path: Path, make: Callable[[], ResultT]) -> ResultT:
    """What `make` returns; its ValueError becomes a UserError that names the file."""
    try:
        return make()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
