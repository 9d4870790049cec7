"""`adapter_config.json`: how PEFT scales the pairs of an adapter, and what of PEFT is supported here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from visualglm.checkpoint.checks import listed
from visualglm.errors import CheckpointError
from visualglm.faults import brief, first_fault

PEFT_CONFIG = "adapter_config.json"

Rank = Annotated[int, Field(strict=True, ge=1, le=2**18)]
# Far beyond any that was meant, and small enough that no weight overflows by it.
Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]

_MOST_TOLD = 3
_PLAIN_MODULE = re.compile(r"\w+(\.\w+)*")
# Settings that change what is computed, and the values with which an adapter is two matrices beside a weight.
_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # With others the base's own weights were changed before training.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_MUST_BE_UNSET = (
    "alora_invocation_tokens",
    "arrow_config",
    # Of the first versions of PEFT: LoRA of some thirds of a packed qkv.
    "enable_lora",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class LoraSettings(BaseModel):
    """What PEFT's configuration says about the result, by PEFT's names; the rest of it is kept as it is."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    r: Rank
    lora_alpha: Alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_modules: Annotated[list[str] | None, BeforeValidator(_as_list)] = None

    def rank(self, module: str) -> int:
        """Of the pair of `module`."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def alpha(self, module: str) -> float:
        """Of the pair of `module`."""
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """What the product of the pair of `module` is multiplied with."""
        rank = self.rank(module)
        return self.alpha(module) / (sqrt(rank) if self.use_rslora else rank)

    def target_faults(self, modules: Collection[str]) -> Iterator[str]:
        """Clauses about `target_modules` and the names of modules that have weights, where they do not agree."""
        if self.target_modules is None:
            return
        targets, ends = set(self.target_modules), {module: _ends(module) for module in modules}
        empty = sorted(targets.difference(*ends.values()))
        if empty:
            yield f"there are no weights of {listed(empty, _MOST_TOLD)}, which target_modules names"
        others = [module for module in modules if targets.isdisjoint(ends[module])]
        if others:
            yield f"target_modules does not name {listed(others, _MOST_TOLD)}, of which there are weights"


def read_lora_settings(values: Mapping[str, Any], where: Path | str) -> LoraSettings:
    """The settings in the values of an `adapter_config.json`, named `where` in errors.

    Raises `CheckpointError` if they are not valid, or ask for what is not computed here.
    """
    for name in (*_SUPPORTED, *_MUST_BE_UNSET):
        value = values.get(name)
        if name in values and (value not in _SUPPORTED[name] if name in _SUPPORTED else value):
            raise CheckpointError(
                f"{where} has {name} {brief(value)}, which is not supported; give an adapter of plain LoRA."
            )
    try:
        settings = LoraSettings.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{where} is not valid: {first_fault(error)}; get the adapter again.") from error
    for name in ("rank_pattern", "alpha_pattern", "target_modules"):
        for module in getattr(settings, name) or ():
            if not _PLAIN_MODULE.fullmatch(module):
                raise CheckpointError(
                    f"{where} names modules by the expression {brief(module)}; name each module in its {name}."
                )
    return settings


def peft_values(
    modules: Mapping[str, int], *, rank: int, alpha: float, dropout: float = 0.0, base_name: str | None = None
) -> dict[str, Any]:
    """The values of an `adapter_config.json` for pairs of the rank that `modules` gives to each module's name.

    All are scaled by alpha / rank, those of another rank too.
    """
    others = {module: own for module, own in modules.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(modules),
        "rank_pattern": others,
        "alpha_pattern": {module: alpha * own / rank for module, own in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
    }


def _ends(module: str) -> set[str]:
    """What PEFT takes for the name of `module`: "a.b.c", "b.c" and "c"."""
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that is the name of `module` or the end of it, as PEFT matches them."""
    found = (value for name, value in (patterns or {}).items() if f".{module}".endswith(f".{name}"))
    return next(found, default)
