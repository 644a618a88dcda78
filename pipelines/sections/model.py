"""The network."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.sections.base import Section


class Model(Section):
    channels: Annotated[list[PositiveInt], Field(min_length=1)] = [32, 64, 64]
    """Width of each resolution level; each level halves the image's side."""
    blocks: PositiveInt = 2
    """Residual blocks a level."""
    attention: list[Annotated[int, Field(ge=0)]] = []
    """Levels with self-attention; 0 is the full resolution."""
    mid_attention: bool = False
    head_channels: PositiveInt | None = None
    """Channels of an attention head; by default one head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    groups: PositiveInt = 32
    classes: PositiveInt | None = None
    """Classes of a class-conditional model, those of the dataset; by default the model knows none."""
    null_class: bool = True
    """Whether a class-conditional model can also be asked of no class, which guidance needs."""
    # Where networks trained by others differ.
    norm_eps: PositiveFloat = 1e-5
    time_sine_first: bool = False
    time_frequency_shift: Annotated[int, Field(ge=0)] = 0
    asymmetric_downsample: bool = False
