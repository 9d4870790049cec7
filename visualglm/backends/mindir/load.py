"""Loads the graphs of a MindIR directory: by MindSpore Lite where that is installed, else by MindSpore itself."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from visualglm.backends.mindir.backend import Graph, MindirBackend
from visualglm.backends.mindspore.environment import prepare_mindspore
from visualglm.checkpoint.mindir_dir import MindirDirectory
from visualglm.memory import available_memory, require_memory
from visualglm.signals import held_signals

_LITE = "mindspore_lite"
# Below this size threads cost more than they bring.
_SMALL_MODEL = 100_000_000


class _Runtime(Protocol):
    """What runs graphs on one device."""

    description: str

    @property
    def threads(self) -> int: ...

    def load(self, path: Path) -> Graph: ...


def prepare_mindir() -> None:
    """Raises `DeviceError` if nothing is installed that runs MindIR."""
    if find_spec(_LITE) is None:
        prepare_mindspore("An export as MindIR")


def load_mindir_backend(directory: MindirDirectory, device: str = "auto", threads: int | None = None) -> MindirBackend:
    """The model of `directory` on `device` ("auto", "cpu", "ascend", "ascend:1").

    threads: how many compute on a CPU; None: one for a small model, or else one a core. Raises `DeviceError` if the
    device is not there or the memory too small, `CheckpointError` if a graph cannot be loaded, or should not be.
    """
    prepare_mindir()
    directory.require_harmless()
    require_memory(directory.memory, available_memory(), "this machine")
    if threads is None:
        threads = 1 if directory.manifest.parameter_count < _SMALL_MODEL else os.cpu_count() or 1
    runtime = _runtime(directory, device, threads)
    graphs = {name: runtime.load(directory.graph(name)) for name in directory.manifest.graphs}
    return MindirBackend(directory, graphs, runtime.description, runtime.threads)


def _runtime(directory: MindirDirectory, device: str, threads: int) -> _Runtime:
    if find_spec(_LITE) is not None:
        from visualglm.backends.mindir.lite import LiteRuntime

        return LiteRuntime(device, threads, directory.context_path)
    with held_signals():
        from visualglm.backends.mindir.graph_cell import MindSporeRuntime

    return MindSporeRuntime(device, threads)
