"""Recipes from files and options, and back into files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from visualglm.checkpoint.files import readable
from visualglm.errors import ConfigError
from visualglm.faults import first_fault
from visualglm.training.recipe import FinetuneRecipe, recipe_keys

RECIPE_NAME = "recipe.yaml"
"""Of the recipe that a run writes into its folder."""
_PATHS = ("model", "data.train", "data.validation")
# Each of a pair says how long to train; the one that is set takes the place of the other.
_INSTEAD = {"run.steps": "run.epochs", "run.epochs": "run.steps"}


def read_recipe(
    path: Path | None = None,
    settings: Mapping[str, object] | None = None,
    *,
    tell: Callable[[str], None] = lambda note: None,
) -> FinetuneRecipe:
    """The recipe in a YAML file, or none, with `settings` in place of what it says: {"run.steps": "20"}.

    A YAML of MindFormers is read too; `tell` is told what of it is ignored, and why. Paths in the file are relative to
    it, those in `settings` to the current folder; in the recipe all are absolute. Raises `ConfigError`.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_file(path, tell)
        _make_absolute(values, path.parent)
    return _validate(_with(values, settings or {}), f"The recipe {path}" if path is not None else "The recipe")


def override(recipe: FinetuneRecipe, settings: Mapping[str, object]) -> FinetuneRecipe:
    """`recipe` with some of its keys set, as `read_recipe` does it."""
    return _validate(_with(recipe.model_dump(), settings), "The recipe")


def recipe_to_yaml(recipe: FinetuneRecipe) -> str:
    """Every key, as `read_recipe` reads it."""
    import yaml

    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _read_file(path: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    from visualglm.mindformers_yaml import is_mindformers
    from visualglm.training.mindformers import translate
    from visualglm.yaml_file import read_yaml

    values = read_yaml(path)
    if not is_mindformers(values):
        return values
    translation = translate(values)
    tell(f"{path} is a recipe of MindFormers.")
    for note in translation.notes():
        tell(note)
    return translation.values


def _with(values: Mapping[str, Any], settings: Mapping[str, object]) -> dict[str, Any]:
    # A part without keys, as where all are commented out, is none.
    changed = {key: deepcopy(value) for key, value in values.items() if value is not None}
    for key, value in settings.items():
        if key not in recipe_keys():
            raise ConfigError(f"A setting is not valid: {_unknown(key)}")
        if key in _INSTEAD and _INSTEAD[key] not in settings:
            _set(changed, _INSTEAD[key], None)
        # The command line has words only, and no other word for nothing.
        _set(changed, key, None if isinstance(value, str) and value.lower() in ("none", "null") else value)
    _make_absolute(changed, Path.cwd())
    return changed


def _set(values: dict[str, Any], key: str, value: object) -> None:
    *parts, name = key.split(".")
    for part in parts:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"The recipe is not valid: {part} must be a table of names and values.")
    values[name] = value


def _make_absolute(values: dict[str, Any], folder: Path) -> None:
    for key in _PATHS:
        *parts, name = key.split(".")
        holder: Any = values
        for part in parts:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(given := holder.get(name), str | Path):
            if not str(given) or "\0" in str(given):
                raise ConfigError(f"{key} is {str(given)!r}, which is no path; give that of a file.")
            holder[name] = (folder / given).absolute()


def _validate(values: Mapping[str, Any], source: str) -> FinetuneRecipe:
    data = values.get("data") or {}
    if isinstance(data, dict) and data.get("train") is None:
        raise ConfigError(f"{source} names no rows to train on; give --train FILE, or data.train in a recipe.")
    try:
        return FinetuneRecipe.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        if fault["type"] == "extra_forbidden":
            raise ConfigError(f"{source} is not valid: {_unknown('.'.join(map(str, fault['loc'])))}") from error
        raise ConfigError(f"{source} is not valid: {first_fault(error)}.") from error


def _unknown(key: str) -> str:
    """The clause about a key that is not there, with those that may have been meant."""
    part, _, name = key.rpartition(".")
    names = {known.rpartition(".")[2]: known for known in recipe_keys()}
    near = [known for other, known in names.items() if known.startswith(f"{part}.") and name and name in other]
    near = near or [names[other] for other in get_close_matches(name, names, n=1)]
    near = near or [known for known in names.values() if known.startswith(f"{part}.")]
    remedy = f"write {' or '.join(near)}" if near else "docs/finetune.md lists those there are"
    return f"the key {readable(key)} is unknown; {remedy}."
