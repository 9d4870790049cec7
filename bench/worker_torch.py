"""Worker of `engines.py` for the torch backend: `worker_torch.py MODEL THREADS DTYPE`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from backend_engine import BackendEngine
from engine_worker import serve
from visualglm.backends.torch.backend import TorchCache
from visualglm.backends.torch.load import load_torch_backend
from visualglm.checkpoint.model_dir import open_model_directory


def load(model: Path, threads: int) -> BackendEngine:
    torch.set_num_threads(threads)
    return BackendEngine(load_torch_backend(open_model_directory(model), "cpu", sys.argv[3]), rewind)


def rewind(cache: TorchCache, length: int) -> None:
    cache.buffers.length = length


if __name__ == "__main__":
    serve(load)
