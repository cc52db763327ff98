"""Kinds of values that entries of a recipe have."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from distmatch.system.paths import expand

Place = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(expand)]
"""A path, a URL, or a model's name. An empty one would be the folder here."""

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Factor = Annotated[float, Field(ge=0)]  # of a loss, or a guidance scale
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average, which would never move at 1


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
