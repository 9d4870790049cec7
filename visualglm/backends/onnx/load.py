"""Opens the graphs of a lite directory: which device, how many threads, and whether it fits."""

from __future__ import annotations

from onnxruntime import InferenceSession

from visualglm.backends.onnx.backend import OnnxBackend
from visualglm.backends.onnx.session import CPU, Device, core_count, open_session
from visualglm.checkpoint.lite_dir import GRAPHS, LiteDirectory
from visualglm.checkpoint.lite_graphs import require_as_told
from visualglm.memory import available_memory, require_memory

# Below this size threads cost more than they bring.
_SMALL_MODEL = 100_000_000


def load_onnx_backend(directory: LiteDirectory, device: str = "auto", threads: int | None = None) -> OnnxBackend:
    """The model of `directory` on `device` ("auto", "cpu", "cuda", "cuda:1", "cann").

    threads: how many compute on a CPU; None: one a real core. Raises `DeviceError` if the device is not there or the
    memory too small, `CheckpointError` if a graph is not what the manifest tells, or the installed onnxruntime cannot
    run it.
    """
    target = Device(device)
    require_as_told(directory)
    if target.kind == CPU:
        require_memory(directory.memory, available_memory(), "this machine")
    if threads is None:
        threads = default_threads(directory.manifest.parameter_count)
    sessions: dict[str, InferenceSession] = {
        name: open_session(directory.graph(name), target, threads) for name in GRAPHS
    }
    return OnnxBackend(directory.config, sessions, target, directory.manifest.precision)


def default_threads(parameter_count: int) -> int:
    """How many compute a model of this size best."""
    return 1 if parameter_count < _SMALL_MODEL else core_count()
