"""What a fine-tuning run does, and nothing about how: the recipe, as `configs/*.yaml` and the command line give it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from visualglm.errors import ConfigError
from visualglm.faults import brief

Method = Literal["lora", "qlora", "ptuning", "qformer", "vit", "full"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["annealing-cosine", "annealing-linear", "annealing-constant", "cosine", "linear", "constant"]
Share = Annotated[float, Field(ge=0, lt=1)]
DEFAULT_STEPS = 300
# Far above those of any model, for which `TuneRecipe.layers` has the right words.
_HIGHEST_LAYER = 10**6


def _split(value: object) -> object:
    """A list as the command line gives it, in one word: "lora,qformer"."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _whole(value: object) -> object:
    """A whole number as the command line gives it; pydantic would not take it for a choice among numbers."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def _layers(value: object) -> object:
    """`layer_range` from a file or the command line; pydantic alone would name every kind that it is not."""
    if value is None or value == "all":
        return value
    given = _split(value) if isinstance(value, str) and "," in value else _whole(value)
    if not isinstance(given, list | tuple):
        valid = _is_within(given, 1)
    else:
        # "3," is a list of one layer, as 3 alone is the first three.
        given = tuple(_whole(layer) for layer in given if layer != "")
        valid = bool(given) and all(_is_within(layer, 0) for layer in given)
    if not valid:
        raise ValueError(
            f'tune.layer_range is {brief(value)}, but must be a list of layers such as [0, 14], "all", '
            "or a number of first layers, at least 1"
        )
    return given


def _is_within(value: object, lowest: int) -> bool:
    return type(value) is int and lowest <= value <= _HIGHEST_LAYER


Listed = BeforeValidator(_split)
LayerRange = Annotated[tuple[int, ...] | int | Literal["all"] | None, BeforeValidator(_layers)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataRecipe(_Part):
    """Rows of `{"img", "prompt", "label"}` or `conversations`, and how they become batches."""

    train: Path
    validation: Path | None = None
    """Rows that are never trained on; without them `held_out` of `train`."""
    held_out: Share = 0.1
    max_length: PositiveInt | None = None
    """Longest row in tokens; None: the model's window. Longer labels are cut, and counted."""
    loss_on: Literal["all", "last"] = "all"
    """Which answers of a conversation are learnt."""
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    cache_images: bool = True
    """Keep the embeddings of images on disk, where ViT and Q-Former stay as they are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation is not None and self.validation.resolve() == self.train.resolve():
            raise ValueError(
                "data.validation is the file that data.train is, and rows that were trained on validate nothing; "
                "leave it out, and data.held_out sets some of them aside"
            )
        return self


class TuneRecipe(_Part):
    """Which parameters are trained. The defaults are those of the MindFormers recipe."""

    methods: Annotated[tuple[Method, ...], Listed, Field(min_length=1)] = ("lora",)
    lora_rank: PositiveInt = 10
    lora_alpha: PositiveFloat = 128.0
    lora_dropout: Share = 0.0
    target_modules: Annotated[tuple[Literal["qkv", "proj", "fc1", "fc2"], ...], Listed, Field(min_length=1)] = (
        "qkv",
        "proj",
    )
    layer_range: LayerRange = None
    """Those with LoRA: a list of layers, a number of first layers, or "all"; None: see `layers`."""
    base_bits: Annotated[Literal[4, 8], BeforeValidator(_whole)] = 4
    """Of the decoder's weights, for qlora."""
    prefix_length: PositiveInt = 32
    """Learned keys and values in every layer, for ptuning."""

    @property
    def has_lora(self) -> bool:
        return "lora" in self.methods or "qlora" in self.methods

    def layers(self, num_hidden_layers: int) -> tuple[int, ...]:
        """The layers with LoRA, in order: unless told the first and the middle one, of 28 layers [0, 14].

        Raises `ConfigError` for one that a decoder of so many layers does not have.
        """
        if self.layer_range == "all":
            return tuple(range(num_hidden_layers))
        if self.layer_range is None:
            return tuple(sorted({0, num_hidden_layers // 2}))
        if isinstance(self.layer_range, int):
            layers: tuple[int, ...] = tuple(range(min(self.layer_range, num_hidden_layers + 1)))
        else:
            layers = tuple(sorted(self.layer_range))
        if layers[-1] >= num_hidden_layers:
            asked = f"the first {self.layer_range:,}" if isinstance(self.layer_range, int) else f"layer {layers[-1]}"
            raise ConfigError(
                f"tune.layer_range names {asked}, but the model has {num_hidden_layers} layers, 0 to "
                f"{num_hidden_layers - 1}; give some of those (--layers)."
            )
        return layers

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("methods", "target_modules", "layer_range"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"tune.{name} names the same twice: {', '.join(map(str, value))}")
        if "full" in self.methods and len(self.methods) > 1:
            other = next(method for method in self.methods if method != "full")
            raise ValueError(f"tune.methods names full and {other}, but full trains everything there is; name one")
        if "lora" in self.methods and "qlora" in self.methods:
            raise ValueError("tune.methods names lora and qlora, which is lora over a base in few bits; name one")
        return self


class OptimizerRecipe(_Part):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = 1e-4
    betas: Annotated[tuple[Share, Share], Listed] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: PositiveFloat = 0.1
    schedule: Schedule = "annealing-cosine"
    warmup_steps: NonNegativeInt = 100
    decay_steps: PositiveInt | None = None
    """The schedule's num_iters; None: as many as the run has."""
    decay_ratio: PositiveFloat = 10.0


class RunRecipe(_Part):
    """How long, in which precision, and what is kept."""

    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    """Of the optimiser; one of `epochs` and `steps` is given, or else there are `DEFAULT_STEPS`."""
    batch_size: PositiveInt = 4
    """Rows of one process at once."""
    accumulation: PositiveInt = 1
    """Batches of one process that make a step."""
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    validate_every: PositiveInt | None = None
    """Steps; None: once an epoch."""
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("run.epochs and run.steps are both given, but either says how long to train; give one")
        return self


class FinetuneRecipe(_Part):
    """Everything that decides what a run learns, but for the number of processes."""

    model: Path | None = None
    """A model directory; None: the built-in model."""
    data: DataRecipe
    tune: TuneRecipe = TuneRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    run: RunRecipe = RunRecipe()


def recipe_keys() -> dict[str, Any]:
    """All keys in a recipe, in order, with their fields: "model", "data.train", …"""
    keys: dict[str, Any] = {}
    for name, field in FinetuneRecipe.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            keys |= {f"{name}.{key}": inner for key, inner in part.model_fields.items()}
        else:
            keys[name] = field
    return keys
