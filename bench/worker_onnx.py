"""Worker of `engines.py` for an export of ours on ONNX Runtime: `worker_onnx.py MODEL THREADS`."""

from __future__ import annotations

from pathlib import Path

from backend_engine import BackendEngine
from engine_worker import serve
from visualglm.backends.onnx.kv_cache import KVCache
from visualglm.backends.onnx.load import load_onnx_backend
from visualglm.checkpoint.lite_dir import open_lite_directory


def load(model: Path, threads: int) -> BackendEngine:
    return BackendEngine(load_onnx_backend(open_lite_directory(model), "cpu", threads), rewind)


def rewind(cache: KVCache, length: int) -> None:
    cache.length = length


if __name__ == "__main__":
    serve(load)
