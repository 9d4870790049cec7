"""How fast a model answers on this machine, how much memory it takes, and what share of the memory's speed it uses.

A decoded token reads each weight of the decoder once, so that the read bandwidth bounds the speed. On a shared machine
both drift: they are measured in turns, and medians are told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.torch.backend import TorchBackend
from visualglm.backends.torch.load import load_torch_backend
from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.files import file_pieces, require_folder
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory, write_model_directory
from visualglm.checkpoint.progress import Report
from visualglm.checkpoint.tensors import Piece
from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig
from visualglm.errors import ConfigError
from visualglm.parameters import Shape, parameter_count, parameter_shapes
from visualglm.processing.layout import Layout, pad_batch

# In the widths of the released model; the sizes of the smallest one are those of nothing in particular.
PRESETS = {
    "full": VisualGLMConfig(dtype="bfloat16"),
    "medium": VisualGLMConfig(
        vision=VisionConfig(num_hidden_layers=4),
        qformer=QFormerConfig(num_hidden_layers=2, cross_attention_layers=(0,)),
        text=TextConfig(num_hidden_layers=4),
        dtype="bfloat16",
    ),
    "tiny": VisualGLMConfig(
        vision=VisionConfig(
            image_size=56, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        ),
        qformer=QFormerConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            cross_attention_layers=(0,),
        ),
        text=TextConfig(
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_sequence_length=512,
            mask_token_id=996,
            gmask_token_id=997,
            bos_token_id=998,
            eos_token_id=999,
        ),
        dtype="bfloat16",
    ),
}

_BLOCK_ELEMENTS = 1 << 23
# Many times the caches, and little beside the weights of the model.
_PROBE_BYTES = 1 << 29
_GB = 1e9


@dataclass(frozen=True)
class Plan:
    """What is measured: medians of `repeats`, and blocks of `steps` tokens between two looks at the bandwidth."""

    repeats: int = 5
    steps: int = 4
    text_tokens: int = 64
    context: int = 128
    batch_sizes: tuple[int, ...] = (4, 16)


@dataclass(frozen=True)
class Figure:
    """One number and what it says."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Result:
    """The figures of one model, and what they were measured with."""

    model: str
    backend: str
    parameters: int
    threads: int
    figures: tuple[Figure, ...]


def measure_model(
    path: Path,
    plan: Plan,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    tell: Callable[[str], None] = lambda stage: None,
) -> Result:
    """Load the model directory at `path` from a warm cache and measure it; `tell` is given the name of each stage.

    threads: how many of torch's compute on a CPU; None: as many as it takes by itself. Raises a `VisualGLMError`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    tell("reading the files once")
    warm_cache(path)
    start = time.perf_counter()
    directory = open_model_directory(path)
    backend = load_torch_backend(directory, device, dtype)
    load = Figure("loading, warm cache", time.perf_counter() - start, "s")
    figures = (load, *Benchmark(backend, plan).run(tell))
    return Result(str(path), backend.description, parameter_count(directory.config), torch.get_num_threads(), figures)


@dataclass(frozen=True)
class RepeatedTensor:
    """A bfloat16 tensor, given as bits, whose elements are those of one block again and again."""

    block: NDArray[np.uint16] = field(repr=False)
    shape: Shape
    dtype: str = "bfloat16"

    def array(self) -> NDArray[Any]:
        return np.resize(self.block, self.shape)

    def pieces(self) -> Iterator[Piece]:
        remaining, data = 2 * prod(self.shape), self.block.view(np.uint8).data
        while remaining:
            piece = data[: min(remaining, len(data))]
            remaining -= len(piece)
            yield piece

    def regrouped(self, groups: Shape, axes: Shape) -> RepeatedTensor:
        """Itself: its order means nothing."""
        return self


def write_random_model(path: Path, config: VisualGLMConfig, report: Report | None = None) -> ModelDirectory:
    """Write a model directory of small random bfloat16 weights, without a tokenizer, as fast as the disk takes it.

    Raises `CheckpointError` if `path` is in use or the disk has no room for it.
    """
    values = np.random.default_rng(0).normal(0, 0.02, _BLOCK_ELEMENTS).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16)
    tensors = {name: RepeatedTensor(block, shape) for name, shape in parameter_shapes(config).items()}
    return write_model_directory(path, Checkpoint(config, tensors, Source(format="random")), report=report)


def warm_cache(path: Path) -> None:
    """Read all files of a folder, so that they are in the system's cache as far as it reaches."""
    require_folder(path)
    for file in path.iterdir():
        for _ in file_pieces(file) if file.is_file() else ():
            pass


def peak_memory() -> int:
    """The most bytes this process has had in main memory so far, memory-mapped weights included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class ReadBandwidth:
    """Reads a buffer as fast as all threads can."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.ones(_PROBE_BYTES // 8, dtype=torch.int64, device=device)

    def measure(self) -> float:
        """Bytes a second, the median of three readings."""
        return _PROBE_BYTES / median(seconds_of(lambda: self._buffer.sum().item()) for _ in range(3))


class Decoding:
    """Greedy decoding behind a prompt of `context` random tokens; it can begin again and again at that point."""

    def __init__(self, backend: TorchBackend, context: int, steps: int) -> None:
        self._backend = backend
        self._steps = steps
        self._layout = random_prompt(backend.config, context, has_image=False)
        logits, self._cache = backend.prefill(self._layout, [], context + steps)
        self._tokens = logits.argmax(-1)

    def spread(self, batch_size: int) -> None:
        """Go on with `batch_size` copies of the first row."""
        rows = np.zeros(batch_size, np.int64)
        self._cache.keep_rows(rows)
        self._layout, self._tokens = self._layout.keep_rows(rows), self._tokens[rows]

    def seconds_per_step(self) -> float:
        """Decode `steps` tokens a row behind the prompt."""
        self._cache.buffers.length = self._layout.sequence_length
        return seconds_of(self._decode) / self._steps

    def _decode(self) -> None:
        tokens = self._tokens
        for _ in range(self._steps):
            tokens = self._backend.step(tokens, self._layout, self._cache).argmax(-1)


class Benchmark:
    """The measurements of a loaded model, each of which adds its figures to those there are."""

    def __init__(self, backend: TorchBackend, plan: Plan) -> None:
        self.figures: list[Figure] = []
        self._backend = backend
        self._plan = plan

    def run(self, tell: Callable[[str], None]) -> list[Figure]:
        """Measure everything; `tell` is given the name of each stage when it begins."""
        before = psutil.cpu_times()
        tell("first question")
        self._first_question()
        tell("image and prompt")
        self._first_token()
        self._memory()
        tell("decoding")
        decoding = Decoding(self._backend, self._plan.context, self._plan.steps)
        self._single(decoding)
        for batch_size in self._plan.batch_sizes:
            tell(f"decoding, batch {batch_size}")
            decoding.spread(batch_size)
            speeds = [batch_size / decoding.seconds_per_step() for _ in range(self._plan.repeats)]
            self._add(f"decoding, batch {batch_size}", median(speeds), "tokens/s")
        self._add("peak memory, with the batches", peak_memory() / _GB, "GB")
        self._add("processor time taken by the host", 100 * stolen_share(before, psutil.cpu_times()), "%")
        return self.figures

    def _first_question(self) -> None:
        """The first use brings the weights in from where they are mapped."""
        pixels, layout = self._pixels(), self._prompt()
        self._add("first token of the first question", sum(self._answer(pixels, layout)), "s")

    def _first_token(self) -> None:
        pixels, layout = self._pixels(), self._prompt()
        rounds = [self._answer(pixels, layout) for _ in range(self._plan.repeats)]
        encoding, prefill = (median(column) for column in zip(*rounds, strict=True))
        slots = self._backend.config.qformer.num_query_tokens
        self._add("encoding an image", encoding, "s")
        self._add(f"prefill, {self._plan.text_tokens} text tokens and {slots} image slots", prefill, "s")
        self._add("time to first token", median(map(sum, rounds)), "s")

    def _memory(self) -> None:
        weights = parameter_count(self._backend.config) * self._backend.dtype.itemsize
        self._add("weights", weights / _GB, "GB")
        self._add("peak memory", peak_memory() / _GB, "GB")

    def _single(self, decoding: Decoding) -> None:
        probe = ReadBandwidth(self._backend.device)
        decoding.seconds_per_step()
        seconds, bandwidths = [], [probe.measure()]
        for _ in range(self._plan.repeats):
            seconds.append(decoding.seconds_per_step())
            bandwidths.append(probe.measure())
        columns = self._plan.context + (self._plan.steps + 1) // 2
        size = step_bytes(self._backend.config, columns, self._backend.dtype.itemsize)
        around = [(before + after) / 2 for before, after in pairwise(bandwidths)]
        shares = [size / spent / bandwidth for spent, bandwidth in zip(seconds, around, strict=True)]
        self._add(f"decoding, batch 1, context {self._plan.context}", 1000 * median(seconds), "ms/token")
        self._add("decoding, batch 1", 1 / median(seconds), "tokens/s")
        self._add("read for a token", size / _GB, "GB")
        self._add("read bandwidth meanwhile", median(bandwidths) / _GB, "GB/s")
        self._add("share of the read bandwidth", 100 * median(shares), "%")

    def _answer(self, pixels: NDArray[np.float32], layout: Layout) -> tuple[float, float]:
        """Seconds to encode an image, and to put a question about it."""
        embeds: list[ImageEmbeds] = []
        encoding = seconds_of(lambda: embeds.extend(self._backend.encode_images(pixels)))
        return encoding, seconds_of(lambda: self._backend.prefill(layout, embeds, layout.sequence_length))

    def _pixels(self) -> NDArray[np.float32]:
        vision = self._backend.config.vision
        shape = (1, vision.in_channels, vision.image_size, vision.image_size)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def _prompt(self) -> Layout:
        return random_prompt(self._backend.config, self._plan.text_tokens, has_image=True)

    def _add(self, name: str, value: float, unit: str) -> None:
        self.figures.append(Figure(name, value, unit))


def random_prompt(config: VisualGLMConfig, text_tokens: int, *, has_image: bool) -> Layout:
    """One row of `text_tokens` random ids that end in [gMASK] <sop>, behind the slots of an image if it has one.

    Raises `ConfigError` if that is longer than the model's window.
    """
    text, slots = config.text, config.qformer.num_query_tokens if has_image else 0
    if slots + text_tokens > text.max_sequence_length:
        raise ConfigError(
            f"The benchmark needs {slots + text_tokens} tokens, but the model's window is {text.max_sequence_length}; "
            "measure another model."
        )
    special = (text.pad_token_id, text.mask_token_id, text.gmask_token_id, text.bos_token_id, text.eos_token_id)
    ordinary = np.setdiff1d(np.arange(text.vocab_size), special)
    words = np.random.default_rng(1).choice(ordinary, text_tokens - 2).tolist()
    ids = [text.pad_token_id] * slots + words + [text.gmask_token_id, text.bos_token_id]
    return pad_batch([ids], [0 if has_image else None], pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id)


def step_bytes(config: VisualGLMConfig, columns: int, element_bytes: int) -> int:
    """Bytes that decoding one token reads: the decoder without its embeddings, and the cache of `columns` tokens."""
    decoder = (
        prod(shape)
        for name, shape in parameter_shapes(config).items()
        if name.startswith("text.") and name != "text.word_embeddings.weight"
    )
    cache = 2 * config.text.num_hidden_layers * config.text.hidden_size * columns
    return (sum(decoder) + cache) * element_bytes


def seconds_of(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def stolen_share(before: Any, after: Any) -> float:
    """The share of the processor's time that went to other guests of the host, between two `psutil.cpu_times()`."""
    stolen = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    return float(stolen / max(sum(after) - sum(before), 1e-9))
