"""Opens the graphs of a lite directory: which device, how many threads, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from onnxruntime import InferenceSession

from visualglm.backends.onnx.backend import OnnxBackend
from visualglm.backends.onnx.session import CPU, Device, Shapes, core_count, open_session, require_signature
from visualglm.checkpoint.lite_dir import Graph, LiteDirectory
from visualglm.memory import available_memory, require_memory

# Below this size threads cost more than they bring.
_SMALL_MODEL = 100_000_000


def load_onnx_backend(directory: LiteDirectory, device: str = "auto", threads: int | None = None) -> OnnxBackend:
    """The model of `directory` on `device` ("auto", "cpu", "cuda", "cuda:1", "cann").

    threads: how many compute on a CPU; None: one a real core. Raises `DeviceError` if the device is not there or the
    memory too small, `CheckpointError` if the installed onnxruntime cannot run a graph.
    """
    target = Device(device)
    if target.kind == CPU:
        require_memory(directory.memory, available_memory(), "this machine")
    if threads is None:
        threads = default_threads(directory.manifest.parameter_count)
    sessions: dict[str, InferenceSession] = {}
    for name, (inputs, outputs) in _signatures(directory).items():
        path = directory.graph(name)
        sessions[name] = open_session(path, target, threads)
        require_signature(sessions[name], path, inputs, outputs)
    return OnnxBackend(directory.config, sessions, target, directory.manifest.precision)


def default_threads(parameter_count: int) -> int:
    """How many compute a model of this size best."""
    return 1 if parameter_count < _SMALL_MODEL else core_count()


def _signatures(directory: LiteDirectory) -> dict[Graph, tuple[Shapes, Shapes]]:
    """What the graphs of this configuration take and give."""
    vision, text = directory.config.vision, directory.config.text
    queries, width, size = directory.config.qformer.num_query_tokens, text.hidden_size, vision.image_size
    inputs: dict[str, Sequence[int | None]] = {
        "inputs_embeds": (None, None, width),
        "position_ids": (None, 2, None),
        "attention_bias": (None, 1, None, None),
        "logits_to_keep": (1,),
    }
    outputs: dict[str, Sequence[int | None]] = {"logits": (None, None, text.vocab_size)}
    if directory.manifest.use_past:
        shape = (None, text.num_attention_heads, None, text.head_dim)
        for index, part in product(range(text.num_hidden_layers), ("key", "value")):
            inputs[f"past_key_values.{index}.{part}"] = outputs[f"present.{index}.{part}"] = shape
    return {
        "vision_encoder": (
            {"pixels": (None, vision.in_channels, size, size)},
            {"image_embeds": (None, queries, width)},
        ),
        "embed_tokens": ({"input_ids": (None, None)}, {"inputs_embeds": (None, None, width)}),
        "decoder": (inputs, outputs),
    }
