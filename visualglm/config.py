"""Frozen, nested configurations of the model: what its parts measure, and nothing about how they are run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, ValidationError, model_validator

from visualglm.errors import ConfigError
from visualglm.faults import first_fault

# Far above any model of this kind, and low enough that a damaged file cannot keep the machine busy for hours.
MAX_LAYERS = 1000
# What is cut off there is no JSON any more; a configuration has a thousand bytes.
_LARGEST_FILE = 2**20
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Width = Annotated[int, Field(ge=1, le=2**18)]
ImageSize = Annotated[int, Field(ge=1, le=4096)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Vocabulary = Annotated[int, Field(ge=1, le=10**7)]
DType = Literal["float32", "float16", "bfloat16"]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _require_divisible(what: str, size: int, by: str, divisor: int) -> None:
    if size % divisor:
        raise ValueError(f"{what} {size} is not a multiple of {by} {divisor}")


class VisionConfig(_Config):
    """The ViT: pre-LN blocks over square patches and one class token."""

    image_size: ImageSize = 224
    patch_size: ImageSize = 14
    in_channels: Annotated[int, Field(ge=1, le=1000)] = 3
    hidden_size: Width = 1408
    intermediate_size: Width = 6144
    num_hidden_layers: Layers = 39
    num_attention_heads: Width = 16
    layer_norm_eps: PositiveFloat = 1e-6
    final_layer_norm_eps: PositiveFloat = 1e-5

    @property
    def sequence_length(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_divisible("vision.image_size", self.image_size, "vision.patch_size", self.patch_size)
        _require_divisible(
            "vision.hidden_size", self.hidden_size, "vision.num_attention_heads", self.num_attention_heads
        )
        return self


class QFormerConfig(_Config):
    """The Q-Former: learned queries that read the ViT through cross-attention in some of its layers."""

    num_query_tokens: Annotated[int, Field(ge=1, le=4096)] = 32
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 12
    cross_attention_layers: tuple[NonNegativeInt, ...] = (0, 2, 4, 6, 8, 10)
    layer_norm_eps: PositiveFloat = 1e-12

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_divisible(
            "qformer.hidden_size", self.hidden_size, "qformer.num_attention_heads", self.num_attention_heads
        )
        beyond = [layer for layer in self.cross_attention_layers if layer >= self.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"qformer.cross_attention_layers names layer {beyond[0]}, "
                f"but qformer.num_hidden_layers is {self.num_hidden_layers}"
            )
        return self


class TextConfig(_Config):
    """ChatGLM: post-LN blocks with scaled residuals and two-dimensional rotary positions."""

    vocab_size: Vocabulary = 130528
    hidden_size: Width = 4096
    intermediate_size: Width = 16384
    num_hidden_layers: Layers = 28
    num_attention_heads: Width = 32
    max_sequence_length: Tokens = 2048
    layer_norm_eps: PositiveFloat = 1e-5
    rotary_base: PositiveFloat = 10000.0
    # The original rounds the rotary frequencies through float16 when the whole model is cast to it.
    rotary_inv_freq_dtype: Literal["float32", "float16"] = "float32"
    pad_token_id: NonNegativeInt = 3
    mask_token_id: NonNegativeInt = 130000
    gmask_token_id: NonNegativeInt = 130001
    bos_token_id: NonNegativeInt = 130004
    eos_token_id: NonNegativeInt = 130005

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def residual_scale(self) -> float:
        """`alpha` of the post-LN residuals, sqrt(2 * layers)."""
        return float((2 * self.num_hidden_layers) ** 0.5)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_divisible("text.hidden_size", self.hidden_size, "text.num_attention_heads", self.num_attention_heads)
        if self.head_dim % 4:
            raise ValueError(
                f"the width of a text attention head, {self.head_dim}, is not a multiple of 4, "
                "as its two rotary halves of pairs need"
            )
        for name in ("pad", "mask", "gmask", "bos", "eos"):
            token_id = getattr(self, f"{name}_token_id")
            if token_id >= self.vocab_size:
                raise ValueError(f"text.{name}_token_id {token_id} is not below text.vocab_size {self.vocab_size}")
        return self


class VisualGLMConfig(_Config):
    """The whole model. The defaults are the sizes of the released VisualGLM-6B."""

    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    text: TextConfig = TextConfig()
    dtype: DType = "float16"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qformer.num_query_tokens + 2 > self.text.max_sequence_length:
            raise ValueError(
                f"qformer.num_query_tokens {self.qformer.num_query_tokens} leaves no room for a question in "
                f"text.max_sequence_length {self.text.max_sequence_length}"
            )
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the configuration") -> Self:
        """Validate `values`; `source` is named in the message of the `ConfigError` for the first fault found."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{source} is not valid: {first_fault(error)}.") from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a `config.json`; raises `ConfigError` if it is missing, no JSON, or not valid."""
        try:
            with open(path, "rb") as file:
                values = json.loads(file.read(_LARGEST_FILE))
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist; give a model directory made by `visualglm convert`.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read as JSON ({error}); convert the checkpoint again.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold one JSON object; convert the checkpoint again.")
        return cls.from_dict(values, str(path))
