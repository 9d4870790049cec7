"""What a fine-tuning run does, and nothing about how: the recipe, as `configs/*.yaml` and the command line give it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

Method = Literal["lora", "qlora", "ptuning", "qformer", "vit", "full"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["annealing-cosine", "annealing-linear", "annealing-constant", "cosine", "linear", "constant"]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    workers: NonNegativeInt = 2
    cache_images: bool = True
    """Keep the embeddings of images on disk, where ViT and Q-Former stay as they are."""


class TuneRecipe(_Part):
    """Which parameters are trained. The defaults are those of the MindFormers recipe."""

    methods: tuple[Method, ...] = ("lora",)
    lora_rank: PositiveInt = 10
    lora_alpha: PositiveFloat = 128.0
    lora_dropout: Share = 0.1
    target_modules: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = ("qkv", "proj")
    layer_range: tuple[NonNegativeInt, ...] | NonNegativeInt | None = (0, 14)
    """A list of layers, a number of first layers, or None for all."""
    base_bits: Literal[4, 8] = 4
    """Of the decoder's weights, for qlora."""
    prefix_length: PositiveInt = 32
    """Learned keys and values in every layer, for ptuning."""


class OptimizerRecipe(_Part):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.95)
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
    """Of the optimiser; one of `epochs` and `steps` is given, or else there are 300 steps."""
    batch_size: PositiveInt = 4
    """Rows of one process at once."""
    accumulation: PositiveInt = 1
    """Batches of one process that make a step."""
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    seed: NonNegativeInt = 1
    validate_every: PositiveInt | None = None
    """Steps; None: once an epoch."""
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10


class FinetuneRecipe(_Part):
    """Everything that decides what a run learns, but for the number of processes."""

    model: Path | None = None
    """A model directory; None: the built-in model."""
    data: DataRecipe
    tune: TuneRecipe = TuneRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    run: RunRecipe = RunRecipe()
