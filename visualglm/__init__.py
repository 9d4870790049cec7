"""VisualGLM-6B, usable everywhere: ask a picture questions in Chinese and English.

import visualglm
model = visualglm.load()                      # the built-in model; or a directory made by `visualglm convert`
print(model.ask("picture.png", "图里有什么？"))
"""

from __future__ import annotations

from visualglm.errors import VisualGLMError

# As `typing` has it. That takes a while to import, and the program has to look after Ctrl-C at once.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from visualglm.model import VisualGLM

__version__ = "0.1.0"
__all__ = ["VisualGLM", "VisualGLMError", "__version__", "load"]


def load(
    path: str | Path | None = None,
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    graph_mode: int | None = None,
) -> VisualGLM:
    """Load a model.

    path: a model directory or an export of one; None is the small built-in model, which knows drawn shapes and short
    words only. backend: "onnx", "torch", "mindspore" or "auto" (onnx on a CPU, torch on a GPU). device: "cpu", "cuda",
    "cuda:1" or "auto"; "mps" and "npu" with torch, "cann" with onnx, "ascend" and "ascend:1" with mindspore. dtype:
    "float32", "bfloat16", "float16", "int8", "int4" or "auto" (exact for small models; else int8 with onnx, and with
    the others as stored, but float32 with mindspore on a CPU). A model directory that onnx is to run is exported once,
    into the cache of the user. graph_mode: of mindspore; 0, which None means, compiles the model into graphs, 1 runs it
    operator by operator.
    Raises `VisualGLMError` for whatever is missing, damaged, too large, or not to be had on this machine.
    """
    from visualglm.loading import load_model

    return load_model(path, backend=backend, device=device, dtype=dtype, adapter=adapter, graph_mode=graph_mode)


def __getattr__(name: str) -> Any:
    # The class costs an import of numpy and Pillow: not for `visualglm --help`.
    if name == "VisualGLM":
        from visualglm.model import VisualGLM

        return VisualGLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
