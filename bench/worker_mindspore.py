"""Worker of `engines.py` for the MindSpore backend in float32: `worker_mindspore.py MODEL THREADS graph|eager`."""

from __future__ import annotations

import sys
from pathlib import Path

from backend_engine import BackendEngine
from engine_worker import serve
from visualglm.backends.mindspore.environment import prepare_mindspore
from visualglm.backends.mindspore.kv_cache import KVCache
from visualglm.checkpoint.model_dir import open_model_directory


def load(model: Path, threads: int) -> BackendEngine:
    prepare_mindspore()
    from visualglm.backends.mindspore.load import load_mindspore_backend

    compiled = sys.argv[3] == "graph"
    backend = load_mindspore_backend(open_model_directory(model), "cpu", "float32", compiled=compiled, threads=threads)
    return BackendEngine(backend, rewind)


def rewind(cache: KVCache, length: int) -> None:
    cache.length = length


if __name__ == "__main__":
    serve(load)
