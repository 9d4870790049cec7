"""Whether a checkpoint belongs to the run that is to go on from it: what differs is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from visualglm.errors import ConfigError
from visualglm.training.checkpoints import checkpoint_folders, read_values

_SHOWN = 3


def newest_of_run(folder: Path, fingerprint: Mapping[str, Any]) -> Path | None:
    """The newest checkpoint in `folder`, None without one.

    Raises `ConfigError` if it was written by a run of another fingerprint, `CheckpointError` if it is damaged.
    """
    found = checkpoint_folders(folder)
    if not found:
        return None
    values = read_values(found[-1])
    require_same(found[-1], values.get("fingerprint", {}), fingerprint)
    return found[-1]


def require_same(checkpoint: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless the fingerprint `found` in a checkpoint is the `wanted` one of this run.

    Fingerprints are nested mappings of what JSON can hold; "processes" in them is the number of processes.
    """
    before, now = (dict(_flatten(fingerprint)) for fingerprint in (found, wanted))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names == ["processes"]:
        raise ConfigError(
            f"{checkpoint} was written by a run of --nproc {before['processes']}, "
            f"and this is one of {now['processes']}; resume with as many, or train into another folder."
        )
    if names:
        differences = [f"{name} was {_shown(before, name)} and is {_shown(now, name)}" for name in names[:_SHOWN]]
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ConfigError(
            f"{checkpoint} was written by another recipe ({', '.join(differences)}{more}); "
            "resume with that one, or train into another folder."
        )


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list | tuple):
        yield prefix, [dict(_flatten(value)) if isinstance(value, Mapping) else value for value in values]
    else:
        yield prefix, values


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = str(values[name]) if name in values else "not there"
    return text if len(text) <= 40 else f"{text[:37]}…"
