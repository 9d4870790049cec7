"""From a path to a loaded model: opens the model directory and hands it to the backend that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from visualglm.backends.base import Backend
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.errors import DeviceError
from visualglm.model import VisualGLM
from visualglm.processing.tokenizer import Tokenizer

BUILTIN_NAME = "visualglm-tiny"
BUILTIN_NOTICE = (
    "The built-in model knows only drawn shapes, numbers and short words: "
    "it shows how everything works and is not VisualGLM-6B."
)


def builtin_path() -> Path:
    """Where the built-in model's directory lies in the installed package."""
    return Path(str(files("visualglm") / "assets" / "tiny"))


def load_model(
    path: str | Path | None, *, backend: str, device: str, dtype: str, adapter: str | Path | None
) -> VisualGLM:
    """See `visualglm.load`."""
    if adapter is not None:
        raise DeviceError(f"The adapter {adapter} cannot be used: this version of visualglm has no adapters yet.")
    load_backend = _backend_loader(backend)
    directory = open_model_directory(builtin_path() if path is None else path)
    tokenizer_path = directory.tokenizer_path
    tokenizer = None if tokenizer_path is None else Tokenizer.for_model(tokenizer_path, directory.config.text)
    name = BUILTIN_NAME if path is None else str(directory.path)
    return VisualGLM(load_backend(directory, device, dtype), tokenizer, name=name)


def _backend_loader(name: str) -> Callable[[ModelDirectory, str, str], Backend]:
    if name not in ("auto", "torch"):
        raise DeviceError(f"The backend {name!r} is unknown; give auto or torch.")
    try:
        from visualglm.backends.torch.load import load_torch_backend
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise DeviceError("The torch backend needs PyTorch; run `pip install 'visualglm[torch]'`.") from error
    return load_torch_backend
