"""Exports a model directory for ONNX Runtime: three graphs and their weights, streamed from file to file."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Literal

from onnx import TensorProto

from visualglm.checkpoint.lite_dir import Graph, LiteDirectory, LiteForm, Precision, write_lite_directory
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.progress import Report
from visualglm.checkpoint.tensors import tensor_bytes
from visualglm.config import VisualGLMConfig
from visualglm.errors import ConfigError
from visualglm.export import decoder
from visualglm.export.embed_tokens import add_embed_tokens
from visualglm.export.layers import Layers
from visualglm.export.linear import BlockLinear, LayerError, Linear, RowLinear, StoredLinear
from visualglm.export.onnx_graph import OnnxGraph
from visualglm.export.quantize import Bits, Method
from visualglm.export.vision_encoder import add_vision_encoder
from visualglm.memory import CacheType

ERRORS = "quantization.json"
# As large as keeps an export of the full size fast; narrow layers would lose too much by it.
_BLOCK_SIZE, _SMALL_BLOCK_SIZE, _WIDE = 128, 32, 1024
# Those that MatMulNBits has.
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_BITS: dict[Precision, Bits] = {"int4": 4, "int8": 8}
_GRAPH_BYTES = 4_000_000


@dataclass(frozen=True)
class ExportOptions:
    """What an export is to be.

    precision: of the decoder's linear layers; with int4 and int8 those of the image encoder and the token embeddings
    are int8. use_past: False leaves the KV cache out. block_size: weights that share a scale (None: 128, in narrow
    models 32). kv_cache: how keys and values are kept (auto: int8 where the weights are whole numbers). method: how
    weights are rounded, see `quantize_blocks`.
    """

    precision: Precision = "int8"
    use_past: bool = True
    block_size: int | None = None
    kv_cache: Literal["auto", "float32", "int8"] = "auto"
    method: Method = "search"

    def form(self, config: VisualGLMConfig) -> LiteForm:
        """The options with all that is left open decided; raises `ConfigError` if they contradict one another."""
        quantized = self.precision in _BITS
        if self.block_size is not None:
            self._check_block_size(self.block_size, quantized)
        if not self.use_past and self.kv_cache != "auto":
            raise ConfigError(f"An export without a KV cache has none of {self.kv_cache}; leave one of the two out.")
        if self.precision == "fp16" and self.kv_cache != "auto":
            raise ConfigError(f"An fp16 export has a float16 cache, not {self.kv_cache}; leave the choice out.")
        default = _BLOCK_SIZE if config.text.hidden_size >= _WIDE else _SMALL_BLOCK_SIZE
        return LiteForm(
            precision=self.precision,
            kv_cache=self._cache_type(quantized),
            use_past=self.use_past,
            block_size=(self.block_size or default) if quantized else None,
            onnxruntime_version=_onnxruntime_version(),
        )

    def _check_block_size(self, size: int, quantized: bool) -> None:
        if not quantized:
            raise ConfigError(f"Blocks of {size} are for int4 and int8; leave them out for {self.precision}.")
        if size not in _BLOCK_SIZES:
            raise ConfigError(f"Blocks of {size} weights cannot be run; give {', '.join(map(str, _BLOCK_SIZES))}.")

    def _cache_type(self, quantized: bool) -> CacheType:
        if self.kv_cache != "auto":
            return self.kv_cache
        return "int8" if quantized else "float16" if self.precision == "fp16" else "float32"


def export_onnx(
    directory: ModelDirectory,
    output: Path | str,
    options: ExportOptions,
    *,
    force: bool = False,
    report: Report | None = None,
) -> LiteDirectory:
    """Export a model directory to `output`, which appears whole or not at all.

    `report` is told the bytes done of those to be written and hashed. Raises `ConfigError` for options that
    contradict one another, `CheckpointError` if weights are not finite, or `output` cannot be written.
    """
    form = options.form(directory.config)
    needed = expected_bytes(directory, form)
    progress = _TwoPhases(needed, report)

    def fill(folder: Path) -> LiteForm:
        errors = write_graphs(folder, directory, form, options.method, progress.wrote)
        if errors:
            layers = [asdict(error) for error in errors]
            values = {"method": options.method, "block_size": form.block_size, "layers": layers}
            (folder / ERRORS).write_text(json.dumps(values, indent=1) + "\n", "utf-8")
        return form

    return write_lite_directory(
        output, directory, fill, needed_bytes=needed, force=force, report=progress.hashed if report else None
    )


def write_graphs(
    folder: Path, directory: ModelDirectory, form: LiteForm, method: Method, wrote: Callable[[int], None]
) -> list[LayerError]:
    """Write the three graphs and their data files into `folder`; returns what rounding did to each linear layer.

    `wrote` is told the bytes of weights as they are written.
    """
    config, block_size = directory.config, form.block_size
    of_encoder: Linear = StoredLinear()
    of_decoder: Linear = StoredLinear()
    if block_size is not None:
        of_encoder, of_decoder = RowLinear(), BlockLinear(_BITS[form.precision], block_size, method)
    cache = form.kv_cache if form.use_past else None
    parts: dict[Graph, tuple[Linear, Callable[[Layers], None]]] = {
        "vision_encoder": (of_encoder, lambda layers: add_vision_encoder(layers, config)),
        "embed_tokens": (of_encoder, lambda layers: add_embed_tokens(layers, config.text, block_size)),
        "decoder": (of_decoder, lambda layers: decoder.add_decoder(layers, config.text, cache)),
    }
    float_type = TensorProto.FLOAT16 if form.precision == "fp16" else TensorProto.FLOAT
    errors = []
    for name, (linear, add) in parts.items():
        path = folder / f"{name}.onnx"
        with closing(OnnxGraph(name, path.with_name(f"{path.name}.data"), float_type, wrote)) as graph:
            layers = Layers(graph, directory.tensors, linear)
            add(layers)
            graph.save(path, f"{name} of a VisualGLM: {form.title}")
        errors += layers.errors
    return errors


def expected_bytes(directory: ModelDirectory, form: LiteForm) -> int:
    """About how much an export takes on the disk."""
    total = _GRAPH_BYTES
    for name, tensor in directory.tensors.items():
        size = tensor_bytes(tensor)
        if form.block_size is not None and len(tensor.shape) == 2 and name.endswith(".weight"):
            is_decoder = name.startswith("text.") and name != "text.word_embeddings.weight"
            bits = _BITS[form.precision] if is_decoder else 8
            size = prod(tensor.shape) * (bits + 40 / form.block_size) / 8  # type: ignore[assignment]
        total += int(size)
    return total


class _TwoPhases:
    """Progress of writing and then hashing the same bytes, as one."""

    def __init__(self, size: int, report: Report | None) -> None:
        self._size, self._report, self._written = size, report, 0

    def wrote(self, count: int) -> None:
        self._written += count
        if self._report:
            self._report(min(self._written, self._size), 2 * self._size)

    def hashed(self, done: int, total: int) -> None:
        if self._report:
            self._report(self._size + self._size * done // max(1, total), 2 * self._size)


def _onnxruntime_version() -> str | None:
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return None
