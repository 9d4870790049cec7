"""The YAML files of MindFormers r1.0, read key by key: what is taken over, and why something is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from visualglm.checkpoint.files import readable
from visualglm.errors import ConfigError

_MARKS = ("run_mode", "runner_config", "runner_wrapper", "train_dataset", "lr_schedule", "pet_config", "model_config")
_DEEPEST, _MOST_KEYS = 20, 10_000
_UNKNOWN = "this program knows no such key"


@dataclass
class Translation:
    """A recipe in our keys, and what became of each key that it had.

    values: nested as in our YAML files, not validated.
    taken: by the keys there those here. ignored: by the keys there the reason.
    """

    values: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """What is taken over, and a sentence for each reason why something is not."""
        yield f"Taken over: {', '.join(f'{key} ({here})' for key, here in self.taken.items())}."
        for reason in dict.fromkeys(self.ignored.values()):
            keys = [key for key, why in self.ignored.items() if why == reason]
            yield f"Ignored, since {reason}: {', '.join(_gathered(keys))}."


def is_mindformers(values: Mapping[str, Any]) -> bool:
    """Whether a YAML file is one of MindFormers, by its top-level keys."""
    return any(mark in values for mark in _MARKS) or isinstance(values.get("model"), dict)


def flat_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """All keys with a value of their own, as paths such as `lr_schedule.type`; raises `ConfigError` for too many."""
    keys = dict(islice(_flatten(values), _MOST_KEYS + 1))
    if len(keys) > _MOST_KEYS:
        raise ConfigError(f"The YAML has more than {_MOST_KEYS:,} keys, which none of MindFormers has.")
    return keys


def reason_for(key: str, reasons: Mapping[str, str]) -> str:
    """Of `reasons`, by patterns of keys with spaces between them, the first that fits."""
    return next(
        (why for patterns, why in reasons.items() if any(fnmatchcase(key, each) for each in patterns.split())),
        _UNKNOWN,
    )


def _flatten(values: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All keys with a value of their own, as paths; of a list of things that have a `type` by that."""
    if depth > _DEEPEST:
        raise ConfigError(f"The YAML nests keys more than {_DEEPEST} deep at {readable(prefix)}; mend that.")
    for name, value in values.items():
        key = f"{prefix}{name}"
        typed = isinstance(value, list) and value and all(isinstance(one, dict) and "type" in one for one in value)
        if typed:
            value = {str(one["type"]): one for one in value}
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{key}.", depth + 1)
        else:
            yield key, value


def _gathered(keys: Iterable[str]) -> Iterator[str]:
    """Those of one parent together: "parallel.{search_mode, full_batch}"."""
    parents: dict[str, list[str]] = {}
    for key in keys:
        parent, dot, name = key.rpartition(".")
        parents.setdefault(parent + dot, []).append(readable(name))
    for parent, names in parents.items():
        yield f"{parent}{{{', '.join(names)}}}" if len(names) > 1 and parent else ", ".join(parent + n for n in names)
