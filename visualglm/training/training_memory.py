"""How much memory training takes, told before anything is loaded, and what to change where there is not enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.memory import BYTES_PER_ELEMENT, gib
from visualglm.parameters import parameter_shapes
from visualglm.training.parts import QUANTIZATION_BLOCK, is_quantized, lora_modules, whole_parts
from visualglm.training.recipe import FinetuneRecipe, TuneRecipe
from visualglm.training.recipe_file import override

# A float32 scale and a zero point for each block of quantised weights.
_BLOCK_BYTES = 5
_FLOAT = BYTES_PER_ELEMENT["float32"]
# AdamW keeps two means for each parameter.
_OPTIMIZER_BYTES = 2 * _FLOAT
# Libraries, and what the allocator holds beside what is used.
_WORKING_BYTES = 1200 * 2**20


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training takes in one process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int = _WORKING_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    def __str__(self) -> str:
        return (
            f"{gib(self.total)} (weights {gib(self.weights)}, gradients {gib(self.gradients)}, optimizer "
            f"{gib(self.optimizer)}, activations {gib(self.activations)}, work {gib(self.working)})"
        )


@dataclass(frozen=True)
class TrainingCase:
    """What decides how much memory a process takes.

    dtype: what is computed in (`load.training_dtype`). length, labels: tokens of the longest row, and those of them
    that are learnt. image_encoder: whether ViT and Q-Former are in memory beside the decoder. shards: processes that
    share the weights (FSDP), else 1.
    """

    config: VisualGLMConfig
    recipe: FinetuneRecipe
    dtype: DType
    length: int
    labels: int
    image_encoder: bool
    shards: int = 1

    def estimate(self) -> TrainingMemory:
        """In one process."""
        trained = self._trained_count()
        weights = self._weight_bytes() + _FLOAT * added_parameters(self.recipe.tune, self.config)
        return TrainingMemory(
            weights=weights // self.shards,
            gradients=_FLOAT * trained // self.shards,
            optimizer=_OPTIMIZER_BYTES * trained // self.shards,
            activations=self.recipe.run.batch_size * sum(self._activation_bytes()),
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights that are in memory."""
        shapes = parameter_shapes(self.config)
        return {name: shape for name, shape in shapes.items() if self.image_encoder or name.startswith("text.")}

    def _weight_bytes(self) -> int:
        return sum(self._bytes_of(name, shape) for name, shape in self._shapes().items())

    def _bytes_of(self, name: str, shape: tuple[int, ...]) -> int:
        tune, count = self.recipe.tune, prod(shape)
        if is_quantized(name, tune):
            return count * tune.base_bits // 8 + _BLOCK_BYTES * count // QUANTIZATION_BLOCK
        return count * (_FLOAT if name.split(".")[0] in whole_parts(tune) else BYTES_PER_ELEMENT[self.dtype])

    def _trained_count(self) -> int:
        whole = whole_parts(self.recipe.tune)
        counts = (prod(shape) for name, shape in self._shapes().items() if name.split(".")[0] in whole)
        return added_parameters(self.recipe.tune, self.config) + sum(counts)

    def _activation_bytes(self) -> Iterator[int]:
        """What one row keeps for the backward pass, part by part."""
        size, whole, config = BYTES_PER_ELEMENT[self.dtype], whole_parts(self.recipe.tune), self.config
        text, vision, qformer = config.text, config.vision, config.qformer
        yield self._stack_bytes(
            self.length, text.hidden_size, text.intermediate_size, self._text_layers(), is_trained="text" in whole
        )
        # Logits in the precision of the model, in float32, and their gradients.
        yield self.labels * text.vocab_size * (2 * size + 3 * _FLOAT)
        if "vision" in whole:
            yield self._stack_bytes(
                vision.sequence_length, vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
            )
        if "qformer" in whole or "vision" in whole:
            yield self._stack_bytes(
                qformer.num_query_tokens, qformer.hidden_size, qformer.intermediate_size, qformer.num_hidden_layers
            )

    def _text_layers(self) -> int:
        """Layers of the decoder that gradients flow through."""
        tune, count = self.recipe.tune, self.config.text.num_hidden_layers
        if tune.has_lora and not whole_parts(tune) and "ptuning" not in tune.methods:
            return count - tune.layers(count)[0]
        return count

    def _stack_bytes(self, tokens: int, width: int, inner: int, layers: int, *, is_trained: bool = True) -> int:
        """Of `layers` blocks; the inputs of linear layers are kept only where their weights are trained."""
        kept = (11 * width + 2 * inner) if is_trained else (8 * width + inner)
        # What one layer works with at a time, in float32.
        at_once = tokens * (8 * width + 2 * inner) * _FLOAT
        if self.recipe.run.activation_checkpointing:
            kept, at_once = width, at_once + tokens * kept * BYTES_PER_ELEMENT[self.dtype]
        return layers * tokens * kept * BYTES_PER_ELEMENT[self.dtype] + at_once


def added_parameters(tune: TuneRecipe, config: VisualGLMConfig) -> int:
    """How many parameters LoRA and prefixes have; raises `ConfigError` for a layer that the model does not have."""
    text, count = config.text, 0
    if tune.has_lora:
        shapes = parameter_shapes(config)
        count += tune.lora_rank * sum(sum(shapes[f"{name}.weight"]) for name in lora_modules(tune, text))
    if "ptuning" in tune.methods:
        count += 2 * text.num_hidden_layers * tune.prefix_length * text.hidden_size
    return count


def require_training_memory(case: TrainingCase, available: int, where: str) -> TrainingMemory:
    """The estimate; raises `DeviceError`, with the setting that would fit, if it is more than is `available`."""
    estimate = case.estimate()
    if estimate.total <= available:
        return estimate
    fitting = next((settings for settings, other in _cheaper(case) if other.estimate().total <= available), None)
    if fitting is None:
        remedy = "no setting makes it fit: use a machine with more memory, or a smaller model"
    else:
        remedy = "give " + " ".join(f"--set {key}={value}" for key, value in fitting.items())
    raise DeviceError(f"Training takes {estimate}, but {where} has {gib(available)} left; {remedy}.")


def _cheaper(case: TrainingCase) -> Iterator[tuple[Mapping[str, Any], TrainingCase]]:
    """Cases that take less, and the keys of the recipe that make them: first those that change no result."""
    for precision in _precisions(case):
        batch = case.recipe.run.batch_size
        while batch:
            for recompute in (False, True):
                settings = precision | _batch_settings(case.recipe, batch)
                if recompute and not case.recipe.run.activation_checkpointing:
                    settings |= {"run.activation_checkpointing": "true"}
                yield settings, _changed(case, settings)
            batch //= 2


def _precisions(case: TrainingCase) -> list[dict[str, Any]]:
    tune = case.recipe.tune
    ways: list[dict[str, Any]] = [{}]
    if case.dtype == "float32" and "full" not in tune.methods:
        ways.append({"run.precision": "bfloat16"})
    if "lora" in tune.methods:
        ways.append(ways[-1] | {"tune.methods": ",".join("qlora" if own == "lora" else own for own in tune.methods)})
    return ways


def _batch_settings(recipe: FinetuneRecipe, batch: int) -> dict[str, Any]:
    """A smaller batch, and as many of them as make the same step."""
    if batch == recipe.run.batch_size:
        return {}
    rows = recipe.run.batch_size * recipe.run.accumulation
    return {"run.batch_size": batch, "run.accumulation": -(-rows // batch)}


def _changed(case: TrainingCase, settings: Mapping[str, Any]) -> TrainingCase:
    return replace(case, recipe=override(case.recipe, settings), dtype=settings.get("run.precision", case.dtype))
