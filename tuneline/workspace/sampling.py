"""How an answer of `tuneline chat` is sampled: the command line checks what the user sets, the program uses it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneline.errors import ConfigError, Problem
from tuneline.wording import listed, nearest


class Sampling(BaseModel):
    """Under transformers' names. Temperature 0 is greedy, as in evaluations."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    temperature: float = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**31)
    """By default another one for each answer."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()


def checked(name: str, text: str, place: str) -> Any:
    """Return the value that a text sets a field to. Raises ConfigError, at `place`, for an unknown field or a wrong value."""
    if name not in Sampling.model_fields:
        found = f"found `{name}`, expected {listed(Sampling.model_fields)}"
        raise ConfigError([Problem("", found, nearest(name, Sampling.model_fields), place=place)])
    value: Any = [text.replace("\\n", "\n")] if name == "stop" else text
    try:
        return getattr(Sampling.model_validate({name: value}), name)
    except ValidationError as error:
        why = error.errors()[0]["msg"].lower()
        raise ConfigError([Problem(name, f"found `{text}`: {why}", place=place)]) from None
