"""The engines that `engines.py` compares: how each gets its model, how it is started and what a token reads."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from engine_process import Command
from ggml_model import ggml_step_bytes, write_ggml
from ggml_weights import WeightType
from gguf_model import gguf_step_bytes, write_gguf
from visualglm.benchmark import export_step_bytes, step_bytes
from visualglm.checkpoint.lite_dir import Precision, open_lite_directory
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.config import DType, VisualGLMConfig
from visualglm.loading import builtin_export, builtin_path
from visualglm.memory import BYTES_PER_ELEMENT
from visualglm.random_model import write_random_model

HERE = Path(__file__).parent
_TORCH = "torch-bf16"
BUILTIN = "builtin"
"""The preset that is no random model, but the built-in one."""


@dataclass(frozen=True)
class Rival:
    """An engine.

    write: makes its model at a path
    step_bytes: bytes of weights that decoding one token reads
    environment: the name of its environment under the folder of `setup_rivals.sh`; None: that of this process
    arguments: what its worker is told behind model and threads
    builtin: where the built-in model lies for it; None: it cannot run that
    """

    name: str
    worker: str
    write: Callable[[Path, VisualGLMConfig], object]
    step_bytes: Callable[[Path, VisualGLMConfig], int]
    environment: str | None = None
    arguments: tuple[str, ...] = ()
    builtin: Path | None = None

    def command(self, model: Path, threads: int, environments: Path) -> Command:
        """Leaves the program if the environment is not there."""
        python = environments / self.environment / "bin" / "python" if self.environment else Path(sys.executable)
        if not python.exists():
            sys.exit(f"{self.name} needs {python}; set it up with: bench/setup_rivals.sh {environments}")
        variables = {"OMP_NUM_THREADS": str(threads)}
        # The library of setup_rivals.sh by which chatglm.cpp learns of the number of threads.
        preload = python.parents[1] / "hardware_concurrency.so"
        if preload.exists():
            variables |= {"LD_PRELOAD": str(preload.resolve()), "HARDWARE_CONCURRENCY": str(threads)}
        return Command([python, HERE / self.worker, model, str(threads), *self.arguments], variables)

    def path(self, folder: Path) -> Path:
        """Where its model lies in `folder`."""
        return folder / self.name

    def write_model(self, folder: Path, config: VisualGLMConfig) -> None:
        """Write its model, whole or not at all."""
        unfinished = folder / f"{self.name}.unfinished"
        try:
            self.write(unfinished, config)
            unfinished.rename(self.path(folder))
        finally:
            remove(unfinished)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _torch(name: str, dtype: DType) -> Rival:
    return Rival(
        name,
        "worker_torch.py",
        write_random_model,
        lambda _, config: step_bytes(config, columns=0, element_bytes=BYTES_PER_ELEMENT[dtype]),
        arguments=(dtype,),
        builtin=builtin_path(),
    )


def _mindspore(mode: Literal["graph", "eager"]) -> Rival:
    """In float32, in the environment of `make test-mindspore`."""
    return Rival(
        f"mindspore-{mode}",
        "worker_mindspore.py",
        write_random_model,
        lambda _, config: step_bytes(config, columns=0, element_bytes=4),
        arguments=(mode,),
        builtin=builtin_path(),
    )


def _onnx(precision: Precision) -> Rival:
    return Rival(
        f"onnx-{precision}",
        "worker_onnx.py",
        lambda path, config: _export(path, config, precision),
        lambda path, _: export_step_bytes(open_lite_directory(path), columns=0),
        builtin=builtin_export() if precision == "fp32" else None,
    )


def _export(path: Path, config: VisualGLMConfig, precision: Precision) -> None:
    """Export the model of the torch backend if it lies beside, or another like it; random weights need no search."""
    from visualglm.export.onnx import ExportOptions, export_onnx  # needs the package onnx, and no other engine does

    options = ExportOptions(precision=precision, method="rtn")
    beside = path.with_name(_TORCH)
    if beside.exists():
        export_onnx(open_model_directory(beside), path, options)
        return
    with TemporaryDirectory(dir=path.parent) as folder:
        export_onnx(write_random_model(Path(folder) / _TORCH, config), path, options)


def _llama(kind: WeightType) -> Rival:
    return Rival(
        f"llama-{kind}",
        "worker_llama.py",
        lambda path, config: write_gguf(path, config.text, kind),
        lambda _, config: gguf_step_bytes(config.text, kind),
        "llama",
    )


def _chatglm(kind: WeightType) -> Rival:
    return Rival(
        f"chatglm-{kind}",
        "worker_chatglm.py",
        lambda path, config: write_ggml(path, config.text, kind),
        lambda _, config: ggml_step_bytes(config.text, kind),
        "chatglm",
    )


# In the order in which models are written: exports are made of the model for torch where it is there.
_ALL = (
    _torch(_TORCH, "bfloat16"),
    _torch("torch-fp32", "float32"),
    _mindspore("graph"),
    _mindspore("eager"),
    _onnx("fp32"),
    _onnx("int4"),
    _onnx("int8"),
    _llama("q4_0"),
    _llama("q8_0"),
    _chatglm("q4_0"),
    _chatglm("q8_0"),
    _chatglm("f16"),
)
RIVALS = {rival.name: rival for rival in _ALL}
