"""How an answer is generated: one frozen set of options for every command and backend."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from visualglm.errors import ConfigError
from visualglm.faults import first_fault

DEFAULT_MAX_NEW_TOKENS = 256


class GenerationConfig(BaseModel):
    """Greedy unless told to sample: by a temperature above 0, a top_k above 1 or a top_p below 1.

    top_k 0 and top_p 1 are no limit; top_k 1 and temperature 0 are greedy whatever else is set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(DEFAULT_MAX_NEW_TOKENS, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=100.0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100.0)
    seed: int | None = Field(None, ge=0)
    stop: tuple[str, ...] = ()
    eos_token_id: int | None = Field(None, ge=0)
    suppress_tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: object) -> object:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text for text in stop):
            raise ValueError("stop holds an empty text, but a stop string must not be empty")
        return stop

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random rather than chosen greedily."""
        if self.top_k == 1 or self.temperature == 0:
            return False
        return self.temperature is not None or self.top_k > 1 or self.top_p < 1

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Validate keyword options; raises `ConfigError` naming the first that is unknown or out of range."""
        try:
            return cls(**options)
        except ValidationError as error:
            fault = error.errors()[0]
            if fault["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise ConfigError(
                    f"The generation option {fault['loc'][0]} is unknown; the options are {known}."
                ) from error
            raise ConfigError(f"The generation option {first_fault(error)}.") from error
