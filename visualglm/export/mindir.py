"""Exports a model directory for MindSpore: an image encoder, a full graph and an incremental one, as MindIR files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from visualglm.backends.mindspore.joined import VisualGLMModel
from visualglm.backends.mindspore.load import CPU, new_model, use_device
from visualglm.checkpoint.mindir_dir import (
    RANK,
    SUFFIX,
    MindirDirectory,
    MindirForm,
    MindirGraph,
    MindirPrecision,
    write_mindir_directory,
)
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.progress import Report
from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import CheckpointError, ConfigError, DeviceError
from visualglm.memory import BYTES_PER_ELEMENT, available_memory, estimate_memory, gib_apart, require_memory
from visualglm.parameters import Shape, parameter_shapes
from visualglm.signals import held_signals

_DEFAULT_LENGTH = 512
_DTYPES: dict[MindirPrecision, DType] = {"fp32": "float32", "fp16": "float16"}
_CACHE_TYPES: dict[MindirPrecision, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16}
# The graphs themselves, without weights.
_GRAPH_BYTES = 16_000_000


@dataclass(frozen=True)
class MindirOptions:
    """seq_length: columns of prompt and answer together; None: 512, or the model's window if that is less."""

    precision: MindirPrecision = "fp32"
    seq_length: int | None = None
    batch_size: int = 1
    use_past: bool = True

    def form(self, config: VisualGLMConfig) -> MindirForm:
        """Raises `ConfigError` if the model has no such form."""
        window, least = config.text.max_sequence_length, config.qformer.num_query_tokens + 2
        length = min(window, _DEFAULT_LENGTH) if self.seq_length is None else self.seq_length
        if not least <= length <= window:
            raise ConfigError(
                f"The length {length:,} cannot be exported: an image and its prompt take {least} tokens and more, and "
                f"the model's window is {window:,}; give --seq-length {least} … {window}."
            )
        return MindirForm(
            precision=self.precision,
            seq_length=length,
            batch_size=self.batch_size,
            use_past=self.use_past,
            mindspore_version=ms.__version__,
        )


class _VisionEncoder(nn.Cell):
    """One image, float32 [1, 3, S, S] → image_embeds [1, queries, text width]."""

    def __init__(self, model: VisualGLMModel) -> None:
        super().__init__()
        self.model = model

    def construct(self, pixels: Tensor) -> Tensor:
        return ops.cast(self.model.encode_images(pixels), ms.float32)


class _FullGraph(nn.Cell):
    """A prompt that begins in the first column, padding behind it → logits after `column`, float32 [batch, vocab].

    Then, with use_past, keys and values, [batch, heads, seq, head_dim], layer by layer: those of the prompt stand where
    the incremental graph needs them. The other inputs are those of `VisualGLMModel.logits`.
    """

    def __init__(self, model: VisualGLMModel, use_past: bool) -> None:
        super().__init__()
        self.model = model
        self.use_past = use_past

    def construct(
        self,
        input_ids: Tensor,
        image_embeds: Tensor,
        image_starts: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        column: Tensor,
    ) -> tuple[Tensor, ...]:
        text = self.model.text
        embeds = self.model.embed(input_ids, image_embeds, image_starts)
        hidden, *present = text(embeds, position_ids, mask)
        last = ops.reshape(ops.gather(hidden, column, 1), (hidden.shape[0], hidden.shape[2]))
        logits = ops.cast(text.lm_head(last), ms.float32)
        return (logits, *present) if self.use_past else (logits,)


class _IncrementalGraph(nn.Cell):
    """See `VisualGLMModel.step`; all keys and values come out, those of the new token in `column`, int32 [1]."""

    def __init__(self, model: VisualGLMModel) -> None:
        super().__init__()
        self.model = model

    def construct(
        self, token_ids: Tensor, position_ids: Tensor, mask: Tensor, column: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        logits, *new = self.model.step(token_ids, position_ids, mask, *past)
        places = ops.broadcast_to(ops.reshape(column, (1, 1, 1, 1)), new[0].shape)
        present: tuple[Tensor, ...] = ()
        for before, one in zip(past, new):  # noqa: B905
            present += (ops.tensor_scatter_elements(before, places, one, axis=2),)
        return logits, *present


def export_mindir(
    directory: ModelDirectory,
    output: Path | str,
    options: MindirOptions,
    *,
    force: bool = False,
    report: Report | None = None,
) -> MindirDirectory:
    """Export a model directory to `output`, which appears whole or not at all; `report` is told of the hashing.

    Raises `ConfigError` for a length that the model does not have, `CheckpointError` if `output` cannot be written,
    `DeviceError` if the memory does not suffice.
    """
    form, dtype = options.form(directory.config), _DTYPES[options.precision]
    use_device(CPU)
    _require_memory(directory.config, form, dtype)

    def fill(folder: Path) -> None:
        model = new_model(directory.config, directory.tensors, dtype).set_train(False)
        for name in form.graphs:
            inputs = [Tensor.from_numpy(np.zeros(*kind)) for kind in _inputs(directory.config, form, name)]
            _write_graph(folder / form.folder(name), _cell(model, name, form), inputs)

    needed = expected_bytes(directory, form)
    return write_mindir_directory(output, directory, form, fill, needed_bytes=needed, force=force, report=report)


def expected_bytes(directory: ModelDirectory, form: MindirForm) -> int:
    """About how much an export takes on the disk: both graphs of the decoder have all its weights."""
    size = BYTES_PER_ELEMENT[_DTYPES[form.precision]]
    total = _GRAPH_BYTES
    for name, shape in parameter_shapes(directory.config).items():
        times = len(form.graphs) - 1 if name.startswith("text.") else 1
        total += prod(shape) * size * times
    return total


def _cell(model: VisualGLMModel, name: MindirGraph, form: MindirForm) -> nn.Cell:
    if name == "vision_encoder":
        return _VisionEncoder(model)
    return _FullGraph(model, form.use_past) if name == "full" else _IncrementalGraph(model)


def _require_memory(config: VisualGLMConfig, form: MindirForm, dtype: DType) -> None:
    """Raises `DeviceError` unless there is room for the model, and for what its graphs take in."""
    model, free = estimate_memory(config, dtype), available_memory()
    require_memory(model, free, "this machine")
    needed = max(_input_bytes(config, form, name) for name in form.graphs)
    left = free - model.weights - model.working
    if needed > left:
        size, room = gib_apart(needed, left)
        raise DeviceError(
            f"{form.batch_size:,} rows of {form.seq_length:,} tokens take {size} of memory beside the model, and this "
            f"machine has {room} left, which is enough for {left * form.batch_size // needed:,} rows; give a smaller "
            "--batch-size, or a smaller --seq-length."
        )


def _input_bytes(config: VisualGLMConfig, form: MindirForm, name: MindirGraph) -> int:
    return sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in _inputs(config, form, name))


def _inputs(config: VisualGLMConfig, form: MindirForm, name: MindirGraph) -> list[tuple[Shape, type[np.generic]]]:
    """Shapes and types of what a graph takes."""
    text, batch, length = config.text, form.batch_size, form.seq_length
    if name == "vision_encoder":
        size = config.vision.image_size
        return [((1, config.vision.in_channels, size, size), np.float32)]
    if name == "full":
        return [
            ((batch, length), np.int32),
            ((batch, config.qformer.num_query_tokens, text.hidden_size), np.float32),
            ((batch,), np.int32),
            ((batch, 2, length), np.int32),
            ((batch, 1, length, length), np.bool_),
            ((1,), np.int32),
        ]
    cache = (batch, text.num_attention_heads, length, text.head_dim), _CACHE_TYPES[form.precision]
    return [
        ((batch,), np.int32),
        ((batch, 2, 1), np.int32),
        ((batch, 1, 1, length), np.bool_),
        ((1,), np.int32),
        *[cache] * (2 * text.num_hidden_layers),
    ]


def _write_graph(folder: Path, cell: nn.Cell, inputs: Sequence[Tensor]) -> None:
    """Write a graph into a new folder; with its weights, unless they are so large that MindSpore puts them aside."""
    folder.mkdir()
    try:
        # It refuses names with a space or a letter beyond ASCII, in folders above too if it is told of them.
        with held_signals(), chdir(folder):
            ms.export(cell, *inputs, file_name=RANK, file_format="MINDIR")
    except RuntimeError as error:
        raise CheckpointError(
            f"MindSpore {ms.__version__} could not write the graph {folder.name} ({str(error).splitlines()[0]})."
        ) from error
    together = folder / f"{RANK}{SUFFIX}"
    if together.exists():
        together.rename(folder / f"{RANK}_graph{SUFFIX}")
    # MindSpore makes files that only their owner can read.
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
