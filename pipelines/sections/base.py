"""What every section of a spec shares."""

from typing import Annotated

import pydantic
from pydantic import Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""Of a spec, its runs and its registered model: what is safe in paths, URIs and filters."""

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
