"""Reads YAML written by people: each key once, and no more of it than a person writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from visualglm.checkpoint.files import readable
from visualglm.errors import ConfigError

_LARGEST_BYTES = 2**20


class _Loader(yaml.SafeLoader):
    """Data alone, no Python objects; the library would let the last of two equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (key, line) in enumerate(keys):
            if key != "<<" and key in (earlier for earlier, _ in keys[:index]):
                raise yaml.YAMLError(f"the key {readable(key)} is there again in line {line}")
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


def read_yaml(path: Path, what: str = "The recipe") -> dict[str, Any]:
    """The mapping that is a YAML file. Raises `ConfigError` if it cannot be read, or holds anything else.

    what: the words for it in errors.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES:
            raise ConfigError(f"{what} {path} is larger than 1 MiB, which none is; give a YAML file.")
        values = yaml.load(content.decode("utf-8-sig"), _Loader)
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read ({error.strerror}); give a YAML file.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} {path} is no valid YAML ({_reason(error)}); mend that.") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{what} {path} does not hold keys and values; see configs/lora.yaml for a file that does.")
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return "too deeply nested" if isinstance(error, RecursionError) else " ".join(str(error).split())
