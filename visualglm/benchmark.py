"""How fast a model answers on this machine, how much memory it takes, and what share of the memory's speed it uses.

A decoded token reads each weight of the decoder once, so that the read bandwidth bounds the speed. On a shared machine
both drift: they are measured in turns, and medians are told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import psutil
from numpy.typing import NDArray

from visualglm.backends.base import Backend, ImageEmbeds, KVCache
from visualglm.bandwidth import Bandwidth, CpuReadBandwidth, TorchReadBandwidth, seconds_of
from visualglm.checkpoint.files import file_pieces, require_folder
from visualglm.checkpoint.lite_dir import LiteDirectory
from visualglm.checkpoint.onnx_file import DATA_SUFFIX
from visualglm.config import VisualGLMConfig
from visualglm.errors import ConfigError
from visualglm.loading import Choice, choose
from visualglm.memory import BYTES_PER_ELEMENT
from visualglm.parameters import parameter_count, parameter_shapes
from visualglm.processing.layout import Layout, pad_batch
from visualglm.signals import held_signals

if TYPE_CHECKING:
    from visualglm.backends.mindspore.backend import MindSporeBackend
    from visualglm.backends.onnx.backend import OnnxBackend
    from visualglm.backends.torch.backend import TorchBackend

_GB = 1e9
# Decoding goes on from block to block; after so many tokens it begins again, for the context is to stay what is told.
_LONGEST_ANSWER = 64


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


@dataclass(frozen=True)
class Subject:
    """A loaded model, and what has to be known of it beside what a `Backend` is.

    weights: bytes of all of them. step_bytes: those that decoding one token reads, of weights and of a cache of so many
    columns. bandwidth: makes what measures that of the memory they lie in, None where there is no way to.
    """

    backend: Backend
    weights: int
    step_bytes: Callable[[int], int]
    bandwidth: Callable[[], Bandwidth] | None


def measure_model(
    choice: Choice, plan: Plan, *, threads: int | None = None, tell: Callable[[str], None] = lambda stage: None
) -> Result:
    """Load a model from a warm cache and measure it; `tell` is given the name of each stage.

    threads: how many compute on a CPU; None: as many as the backend takes by itself. Raises a `VisualGLMError`.
    """
    path = choice.directory.path
    tell("reading the files once")
    warm_cache(path)
    # The library is imported before: that is no part of loading.
    with held_signals():
        import_module(f"visualglm.backends.{choice.backend}.load")
    forget_peak_memory()
    start = time.perf_counter()
    again = choose(path, backend=choice.backend, device=choice.device, dtype=choice.dtype, graph_mode=choice.graph_mode)
    subject = load_subject(again, threads)
    load = Figure("loading, warm cache", time.perf_counter() - start, "s")
    figures = (load, *Benchmark(subject, plan).run(tell))
    parameters = parameter_count(choice.config)
    return Result(choice.name, subject.backend.description, parameters, subject.backend.threads, figures)


def load_subject(choice: Choice, threads: int | None = None) -> Subject:
    """Load a model for the benchmark, to compute with so many threads on a CPU (None: as many as the backend takes).

    Raises a `VisualGLMError`.
    """
    if isinstance(choice.directory, LiteDirectory):
        return _onnx_subject(choice, choice.directory, threads)
    return _mindspore_subject(choice, threads) if choice.backend == "mindspore" else _torch_subject(choice, threads)


def _onnx_subject(choice: Choice, directory: LiteDirectory, threads: int | None) -> Subject:
    from visualglm.backends.onnx.session import CPU

    backend = cast("OnnxBackend", choice.load(threads).backend)
    bandwidth = partial(CpuReadBandwidth, backend.threads) if backend.device.kind == CPU else None
    return Subject(backend, directory.weights_bytes, partial(export_step_bytes, directory), bandwidth)


def _torch_subject(choice: Choice, threads: int | None) -> Subject:
    backend = cast("TorchBackend", choice.load(threads).backend)
    size, on_cpu = backend.dtype.itemsize, backend.device.type == "cpu"
    return Subject(
        backend,
        parameter_count(backend.config) * size,
        partial(step_bytes, backend.config, element_bytes=size),
        partial(CpuReadBandwidth, backend.threads) if on_cpu else partial(TorchReadBandwidth, backend.device),
    )


def _mindspore_subject(choice: Choice, threads: int | None) -> Subject:
    backend = cast("MindSporeBackend", choice.load(threads).backend)
    size = BYTES_PER_ELEMENT[backend.dtype]
    return Subject(
        backend,
        parameter_count(backend.config) * size,
        partial(step_bytes, backend.config, element_bytes=size),
        partial(CpuReadBandwidth, backend.threads) if backend.device == "cpu" else None,
    )


def warm_cache(path: Path) -> None:
    """Read all files of a folder, so that they are in the system's cache as far as it reaches."""
    require_folder(path)
    for file in path.iterdir():
        for _ in file_pieces(file) if file.is_file() else ():
            pass


def forget_peak_memory() -> None:
    """Count the peak anew from here on, where the system can do that: an export may have been made before."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes this process has had in main memory so far, memory-mapped weights included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Decoding:
    """Greedy decoding behind a prompt of `context` random tokens, block by block.

    Raises `ConfigError` if that and a block are longer than the model's window.
    """

    _layout: Layout
    _cache: KVCache
    _tokens: NDArray[np.int64]

    def __init__(self, backend: Backend, context: int, steps: int) -> None:
        window = backend.config.text.max_sequence_length
        require_window(backend.config, context + steps)
        self._backend = backend
        self._context = context
        self._steps = steps
        self._capacity = min(window, context + max(steps, _LONGEST_ANSWER))
        self._batch_size = 1
        self._begin()

    @property
    def columns(self) -> int:
        """Those of the cache that are filled."""
        return self._cache.length

    def spread(self, batch_size: int) -> None:
        """Go on with `batch_size` copies of the first row."""
        self._batch_size = batch_size
        rows = np.zeros(batch_size, np.int64)
        self._cache.keep_rows(rows)
        self._layout, self._tokens = self._layout.keep_rows(rows), self._tokens[rows]

    def seconds_per_step(self) -> float:
        """Decode `steps` more tokens a row."""
        if self._cache.length + self._steps > self._capacity:
            self._begin()
        return seconds_of(self._decode) / self._steps

    def _begin(self) -> None:
        self._layout = random_prompt(self._backend.config, self._context, has_image=False)
        logits, self._cache = self._backend.prefill(self._layout, [], self._capacity)
        self._tokens = logits.argmax(-1)
        self.spread(self._batch_size)

    def _decode(self) -> None:
        for _ in range(self._steps):
            self._tokens = self._backend.step(self._tokens, self._layout, self._cache).argmax(-1)


class Benchmark:
    """The measurements of a loaded model, each of which adds its figures to those there are."""

    def __init__(self, subject: Subject, plan: Plan) -> None:
        self.figures: list[Figure] = []
        self._subject = subject
        self._backend = subject.backend
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
        self._add("weights", self._subject.weights / _GB, "GB")
        self._add("peak memory", peak_memory() / _GB, "GB")

    def _single(self, decoding: Decoding) -> None:
        decoding.seconds_per_step()
        # Made no sooner: its buffer is no part of the memory that the model takes.
        probes = [self._subject.bandwidth()] if self._subject.bandwidth else []
        seconds, sizes, bandwidths = [], [], [probe.measure() for probe in probes]
        for _ in range(self._plan.repeats):
            seconds.append(decoding.seconds_per_step())
            sizes.append(self._subject.step_bytes(decoding.columns - self._plan.steps // 2))
            bandwidths += [probe.measure() for probe in probes]
        self._add(f"decoding, batch 1, context {self._plan.context}", 1000 * median(seconds), "ms/token")
        self._add("decoding, batch 1", 1 / median(seconds), "tokens/s")
        if bandwidths:
            around = [(before + after) / 2 for before, after in pairwise(bandwidths)]
            speeds = [size / spent for size, spent in zip(sizes, seconds, strict=True)]
            shares = [speed / bandwidth for speed, bandwidth in zip(speeds, around, strict=True)]
            self._add("read for a token", median(sizes) / _GB, "GB")
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
    require_window(config, slots + text_tokens)
    special = (text.pad_token_id, text.mask_token_id, text.gmask_token_id, text.bos_token_id, text.eos_token_id)
    ordinary = np.setdiff1d(np.arange(text.vocab_size), special)
    words = np.random.default_rng(1).choice(ordinary, text_tokens - 2).tolist()
    ids = [text.pad_token_id] * slots + words + [text.gmask_token_id, text.bos_token_id]
    return pad_batch([ids], [0 if has_image else None], pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id)


def require_window(config: VisualGLMConfig, tokens: int) -> None:
    """Raises `ConfigError` unless so many tokens fit the model's window."""
    window = config.text.max_sequence_length
    if tokens > window:
        raise ConfigError(
            f"The benchmark needs {tokens} tokens, but the model's window is {window}; measure another model."
        )


def step_bytes(config: VisualGLMConfig, columns: int, element_bytes: int) -> int:
    """Bytes that decoding one token reads: the decoder without its embeddings, and the cache of `columns` tokens."""
    decoder = (
        prod(shape)
        for name, shape in parameter_shapes(config).items()
        if name.startswith("text.") and name != "text.word_embeddings.weight"
    )
    cache = 2 * config.text.num_hidden_layers * config.text.hidden_size * columns
    return (sum(decoder) + cache) * element_bytes


def export_step_bytes(directory: LiteDirectory, columns: int) -> int:
    """The same for an export on a CPU, where weights that are not quantised are widened to float32."""
    graph = directory.graph("decoder")
    data = directory.manifest.files.get(f"{graph.name}{DATA_SUFFIX}")
    widened = 0 if directory.manifest.block_size else step_bytes(directory.config, 0, BYTES_PER_ELEMENT["float32"])
    cache = directory.memory.kv_cache * columns // directory.config.text.max_sequence_length
    return max(data.size if data else 0, widened) + cache


def stolen_share(before: Any, after: Any) -> float:
    """The share of the processor's time that went to other guests of the host, between two `psutil.cpu_times()`."""
    stolen = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    return float(stolen / max(sum(after) - sum(before), 1e-9))
