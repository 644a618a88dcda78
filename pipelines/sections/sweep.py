"""The sweep."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.sections.base import Section


class EarlyStop(Section):
    """Asynchronous successive halving (Li et al. 2018) on the images-seen clock."""

    grace_images: PositiveInt
    """Images every trial may train on."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """One trial in so many goes on at each rung."""


class Sweep(Section):
    parameters: dict[str, Annotated[list[Any], Field(min_length=1)]]
    """Dotted spec field -> the values to try."""
    search: Literal["grid", "random"] = "grid"
    trials: PositiveInt | None = None
    """Number of random trials; a grid has its own."""
    concurrent: PositiveInt = 1
    early_stop: EarlyStop | None = None
    frechet_images: PositiveInt = 256
    """Samples a trial's Frechet distance is taken from."""

    @model_validator(mode="after")
    def _trials_belong_to_random(self) -> "Sweep":
        if (self.search == "random") != (self.trials is not None):
            raise ValueError("sweep.trials: give it with `search: random`, and only then")
        return self
