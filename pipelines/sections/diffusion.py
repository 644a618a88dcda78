"""The diffusion process and its noise schedule."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from pipelines.sections.base import Fraction, Section


class Linear(Section):
    kind: Literal["linear"] = "linear"
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02


class Quadratic(Section):
    kind: Literal["quadratic"]
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02


class Constant(Section):
    kind: Literal["constant"]
    beta: Fraction = 0.01


class Cosine(Section):
    kind: Literal["cosine"]
    s: PositiveFloat = 0.008


class Sigmoid(Section):
    kind: Literal["sigmoid"]
    start: float = -3.0
    end: float = 3.0
    tau: PositiveFloat = 1.0


class Rates(Section):
    kind: Literal["rates"]
    min_signal_rate: Fraction = 0.02
    max_signal_rate: Fraction = 0.95


class Betas(Section):
    kind: Literal["betas"]
    values: Annotated[list[float], Field(min_length=2)]
    """beta_1..beta_T."""


class AlphaBars(Section):
    kind: Literal["alpha_bars"]
    values: Annotated[list[float], Field(min_length=2)]
    """alpha_bar_1..alpha_bar_T, falling."""


Schedule = Annotated[
    Linear | Quadratic | Constant | Cosine | Sigmoid | Rates | Betas | AlphaBars, Field(discriminator="kind")
]


class Diffusion(Section):
    timesteps: Annotated[int, Field(ge=2)] = 1000
    schedule: Schedule = Linear()
    """Its kind (linear where none is given) and that kind's own parameters."""
    zero_terminal: bool = False
    """Rescale the schedule to leave no signal at T; then predict v or x0."""
    predict: Literal["eps", "x0", "v", "mean"] = "eps"
    variance: Literal["small", "large", "learned_range"] = "small"

    @model_validator(mode="before")
    @classmethod
    def _linear_where_no_kind(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("schedule"), dict):
            return {**fields, "schedule": {"kind": "linear", **fields["schedule"]}}
        return fields
