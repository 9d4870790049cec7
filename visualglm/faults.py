"""The faults that pydantic finds, in the words of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

_MUST_BE = {
    "greater_than": "above {gt:,}",
    "greater_than_equal": "at least {ge:,}",
    "less_than": "below {lt:,}",
    "less_than_equal": "at most {le:,}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "too_long": "at most {max_length} values",
    "too_short": "a list of at least {min_length}",
}
# The first words of the types of fault; of each there are several, such as int_type and int_parsing.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "path": "a path",
    "tuple": "a list",
    "dict": "a table of names and values",
    "model": "a table of names and values",
    "list": "a list",
    "dataclass": "a table of names and values",
}
# Where a word was understood as a number, it is told as one.
_OF_NUMBERS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
_UNKNOWN_KEYS = ("extra_forbidden", "unexpected_keyword_argument", "invalid_key")


def first_fault(error: ValidationError) -> str:
    """The first fault in `error` as a clause: "text.hidden_size is 0, but must be at least 1"."""
    fault = error.errors()[0]
    where = _place(fault["loc"])
    if fault["type"] in _UNKNOWN_KEYS:
        return f"the key {where} is unknown"
    if fault["type"] == "value_error":
        return fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{where} is missing"
    given = _given(fault["type"], fault["input"])
    return f"{where} is {given}, but must be {_must_be(fault['type'], fault.get('ctx', {}))}"


def brief(value: object) -> str:
    """A value for a message, not endless."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python spells out no whole number of more than 4,300 digits
        return "a huge number"


def _place(parts: Sequence[str | int]) -> str:
    """ "tune.lora_rank", or "tune.methods (entry 1)"."""
    *start, last = parts or ("it",)
    if start and isinstance(last, int):
        return f"{'.'.join(map(str, start))} (entry {last + 1})"
    return ".".join(map(str, [*start, last]))


def _given(kind: str, value: object) -> str:
    """A value as it was written, whether by a word of the command line or in a file."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.80}" if kind in _OF_NUMBERS and isinstance(value, str) else brief(value)


def _must_be(kind: str, limits: dict[str, Any]) -> str:
    if kind in _MUST_BE:
        whole = {name: int(limit) for name, limit in limits.items() if isinstance(limit, float) and limit.is_integer()}
        return _MUST_BE[kind].format(**limits | whole)
    return _KINDS.get(kind.partition("_")[0], "of another kind")
