"""The three graphs of an export in a folder: written from a model directory, and opened to be judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onnx import TensorProto
from onnxruntime import InferenceSession

from visualglm.backends.onnx.backend import OnnxBackend
from visualglm.backends.onnx.load import default_threads
from visualglm.backends.onnx.session import CPU, Device, open_session
from visualglm.checkpoint.lite_dir import GRAPHS, Graph, LiteForm
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.export import decoder
from visualglm.export.embed_tokens import add_embed_tokens
from visualglm.export.layers import Layers, write_graph
from visualglm.export.linear import BlockLinear, LayerError, Linear, RowLinear, StoredLinear
from visualglm.export.rounding import Rounding
from visualglm.export.vision_encoder import add_vision_encoder


def write_graphs(
    folder: Path,
    directory: ModelDirectory,
    form: LiteForm,
    rounding: Rounding | None = None,
    wrote: Callable[[int], None] = lambda count: None,
) -> list[LayerError]:
    """Write the three graphs and their data files into `folder`; returns what rounding did to each linear layer.

    rounding: of the decoder's layers, None if nothing is rounded. `wrote` is told the bytes of weights as they are
    written.
    """
    config, block_size = directory.config, form.block_size
    of_encoder: Linear = StoredLinear() if rounding is None else RowLinear()
    of_decoder: Linear = StoredLinear() if rounding is None else BlockLinear(rounding)
    cache = form.kv_cache if form.use_past else None
    parts: dict[Graph, tuple[Linear, Callable[[Layers], None]]] = {
        "vision_encoder": (of_encoder, lambda layers: add_vision_encoder(layers, config)),
        "embed_tokens": (of_encoder, lambda layers: add_embed_tokens(layers, config.text, block_size)),
        "decoder": (of_decoder, lambda layers: decoder.add_decoder(layers, config.text, cache)),
    }
    float_type = TensorProto.FLOAT16 if form.precision == "fp16" else TensorProto.FLOAT
    errors = []
    for name, (linear, add) in parts.items():
        errors += write_graph(
            _path(folder, name),
            directory.tensors,
            linear,
            add,
            float_type=float_type,
            description=f"{name} of a VisualGLM: {form.title}",
            wrote=wrote,
        )
    return errors


def open_graphs(folder: Path, directory: ModelDirectory, form: LiteForm) -> OnnxBackend:
    """The graphs of `folder` on the CPU, as `write_graphs` wrote them; nothing need lie beside them."""
    device, threads = Device(CPU), default_threads(directory.manifest.parameter_count)
    sessions: dict[str, InferenceSession] = {
        name: open_session(_path(folder, name), device, threads) for name in GRAPHS
    }
    return OnnxBackend(directory.config, sessions, device, form.precision)


def _path(folder: Path, name: Graph) -> Path:
    return folder / f"{name}.onnx"
