"""The model in float32, a layer at a time: what its linear layers are given, and what it makes of it in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.onnx.backend import attention_bias, fill_slots
from visualglm.backends.onnx.load import default_threads
from visualglm.backends.onnx.session import CPU, Device, computes, open_session
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.config import VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.export.decoder import add_decoder_head, add_decoder_layer
from visualglm.export.embed_tokens import add_embed_tokens
from visualglm.export.examples import Examples, answer_columns, text_columns
from visualglm.export.layers import Layers, write_graph
from visualglm.export.linear import Linear, StoredLinear, TappedLinear
from visualglm.export.vision_encoder import add_vision_encoder
from visualglm.memory import available_memory, gib_apart
from visualglm.parameters import parameter_shapes
from visualglm.processing.layout import Layout

Floats = NDArray[np.float32]
Outputs = dict[str, Floats]

# As float32, and what is mapped and packed beside that.
_WEIGHT_BYTES = 6
# Of each element of the widest Hessian: its factor and the inverse of that, and what it takes to compute them.
_GPTQ_BYTES = 20
_BASE_BYTES = 600 * 2**20
_ENCODER = "vision_encoder"


@dataclass
class _Group:
    """Rows of one forward pass; `hidden` [rows, sequence, width] is what the part that comes next is given."""

    layout: Layout
    hidden: Floats


class LayerwiseModel:
    """A model directory in float32 on some examples, of which no more than a layer is in memory at a time.

    Its graphs are written into `scratch`, each in place of the last. Raises `DeviceError` if the memory is too small;
    `calibrates` says whether it has to do for GPTQ too, and `beside` how many bytes of an export for judging that.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        examples: Iterable[Examples],
        scratch: Path,
        *,
        calibrates: bool = False,
        beside: int = 0,
    ) -> None:
        self._directory, self._text = directory, directory.config.text
        self._working_bytes = partial(working_bytes, directory.config, calibrates=calibrates, beside=beside)
        self._path = scratch / "part.onnx"
        self._groups = self._embed(examples)
        self._done = 0
        self._hessians: Outputs = {}

    @property
    def rows(self) -> int:
        return sum(group.layout.batch_size for group in self._groups)

    def hessian(self, layer: str) -> Floats:
        """The mean of x xᵀ over inputs x of a linear layer, [in, in]; asked for once, in the order of the layers."""
        while layer not in self._hessians:
            self._hessians = self._head_hessian() if self._is_through else self._run_layer()
        return self._hessians.pop(layer)

    def answer_logits(self) -> Iterator[Floats]:
        """Logits [tokens, vocab] of the answers of each group; what is left of the layers is run first."""
        while not self._is_through:
            self._run_layer()
        session = self._open(lambda layers: add_decoder_head(layers, self._text), StoredLinear())
        for group in self._groups:
            yield _run(session, group.hidden[answer_columns(group.layout)][None])["logits"][0]

    @property
    def _is_through(self) -> bool:
        return self._done == self._text.num_hidden_layers

    def _embed(self, examples: Iterable[Examples]) -> list[_Group]:
        self._require_memory(0)
        session = self._open(lambda layers: add_vision_encoder(layers, self._directory.config), StoredLinear())
        encoded = [(batch.groups, _encode(session, batch.pixels)) for batch in examples]
        self._require_memory(sum(group.layout.input_ids.size for groups, _ in encoded for group in groups))
        session = self._open(lambda layers: add_embed_tokens(layers, self._text, None), StoredLinear())
        groups = []
        for group, images in ((group, images) for groups_of, images in encoded for group in groups_of):
            embeds = session.run(None, {"input_ids": group.layout.input_ids})[0]
            fill_slots(embeds, group.layout, [images[index] for index in group.scene_index if index >= 0])
            groups.append(_Group(group.layout, embeds))
        return groups

    def _require_memory(self, columns: int) -> None:
        needed, available = self._working_bytes(columns), available_memory()
        if needed > available:
            takes, left = gib_apart(needed, available)
            raise DeviceError(
                f"Calibrating and judging take {takes} of memory, but this machine has {left} left; "
                "close other programs, give fewer rows, or export with --method search --evaluate 0."
            )

    def _run_layer(self) -> Outputs:
        """Run the next layer; returns the Hessians of its linear layers."""
        session = self._open(lambda layers: add_decoder_layer(layers, self._text, self._done), TappedLinear())
        self._done += 1
        sums = _MeanSquares()
        for group in self._groups:
            outputs = _run(session, group.hidden, group.layout)
            group.hidden = outputs.pop("hidden_states")
            seen = text_columns(group.layout)
            sums.add({name: inputs[seen] for name, inputs in outputs.items()})
        return sums.means()

    def _head_hessian(self) -> Outputs:
        session = self._open(lambda layers: add_decoder_head(layers, self._text), TappedLinear())
        sums = _MeanSquares()
        for group in self._groups:
            outputs = _run(session, group.hidden[answer_columns(group.layout)][None])
            sums.add({name: inputs[0] for name, inputs in outputs.items() if name != "logits"})
        return sums.means()

    def _open(self, add: Callable[[Layers], None], linear: Linear) -> ort.InferenceSession:
        self._path.unlink(missing_ok=True)
        self._path.with_name(f"{self._path.name}.data").unlink(missing_ok=True)
        write_graph(self._path, self._directory.tensors, linear, add)
        return open_session(self._path, Device(CPU), default_threads(self._directory.manifest.parameter_count))


def working_bytes(config: VisualGLMConfig, columns: int, *, calibrates: bool, beside: int = 0) -> int:
    """The memory that a `LayerwiseModel` takes for examples of so many columns, and `gptq` with its Hessians.

    beside: bytes of the export that the decoder is compared with.
    """
    text, parts = config.text, Counter[str]()
    for name, shape in parameter_shapes(config).items():
        parts[_part(name)] += prod(shape)
    encoder = parts.pop(_ENCODER)
    most = max(_WEIGHT_BYTES * encoder, _WEIGHT_BYTES * max(parts.values()) + beside)
    if calibrates:
        widest = max(text.hidden_size, text.intermediate_size)
        hessians = 4 * (3 * text.hidden_size**2 + text.intermediate_size**2)
        most = max(most, _GPTQ_BYTES * widest**2 + hessians)
    return most + 2 * 4 * columns * text.hidden_size + _BASE_BYTES


def _part(name: str) -> str:
    """What is in memory together with the parameter of that name."""
    if not name.startswith("text."):
        return _ENCODER
    return ".".join(name.split(".")[: 3 if name.startswith("text.layers.") else 2])


class _MeanSquares:
    """The mean of x xᵀ for each of several x."""

    def __init__(self) -> None:
        self._sums: Outputs = {}
        self._count = 0

    def add(self, inputs: Outputs) -> None:
        """inputs: [columns, in] each, of the same columns."""
        for name, x in inputs.items():
            self._sums[name] = self._sums.get(name, np.float32(0)) + x.T @ x
        self._count += len(x)

    def means(self) -> Outputs:
        for total in self._sums.values():
            total /= np.float32(max(1, self._count))
        return self._sums


@computes
def _encode(session: ort.InferenceSession, pixels: Floats) -> list[ImageEmbeds]:
    return [ImageEmbeds(array) for array in session.run(["image_embeds"], {"pixels": pixels})[0]] if len(pixels) else []


@computes
def _run(session: ort.InferenceSession, hidden: Floats, layout: Layout | None = None) -> Outputs:
    """The outputs of a layer, or without a layout of the head, by name."""
    inputs: dict[str, NDArray[Any]] = {"inputs_embeds": hidden}
    if layout is not None:
        inputs |= {"position_ids": layout.position_ids(), "attention_bias": attention_bias(layout.attention_mask())}
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))
