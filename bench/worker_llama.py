"""Worker of `engines.py` for llama.cpp, through the low level of llama-cpp-python: `worker_llama.py MODEL THREADS`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as llama  # type: ignore[import-not-found]

from engine_worker import seconds_of, serve

_ANY_TOKEN = 100
_Place = tuple[int, int]  # a row of the batch and a position in it


class Rows:
    """A context for so many rows of so many tokens, whose caches are apart, so that none looks at another's."""

    def __init__(self, model: Any, rows: int, tokens: int, threads: int) -> None:
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = rows * tokens, rows
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = False
        if rows == 1:  # where flash attention costs a third more time at 2000 tokens; it gains a little on batches
            parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.count = rows
        self._context = _made(llama.llama_init_from_model(model, parameters), "a context")
        self._memory = llama.llama_get_memory(self._context)
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def prompt(self, tokens: int) -> None:
        """Compute a prompt in the first row."""
        llama.llama_memory_clear(self._memory, False)
        self._compute([(0, position) for position in range(tokens)], outputs=1)

    def spread(self) -> None:
        """Copy the first row's cache to all the others."""
        for row in range(1, self.count):
            llama.llama_memory_seq_cp(self._memory, 0, row, -1, -1)

    def decode(self, context: int, steps: int) -> None:
        """Go on behind `context` tokens in all rows."""
        for row in range(self.count):
            llama.llama_memory_seq_rm(self._memory, row, context, -1)
        for position in range(context, context + steps):
            self._compute([(row, position) for row in range(self.count)], outputs=self.count)

    def close(self) -> None:
        llama.llama_free(self._context)

    def _compute(self, places: list[_Place], outputs: int) -> None:
        """One token at each place; the most likely tokens behind the last `outputs` of them are looked up."""
        batch = _batch(places, outputs)
        failed = llama.llama_decode(self._context, batch)
        llama.llama_batch_free(batch)
        if failed:
            sys.exit(f"llama_decode failed with {failed}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self._context), (outputs, self._vocabulary))
        logits.argmax(-1)


class LlamaEngine:
    """Makes a context for each shape of the batch; there is never more than one."""

    abilities = ("batches",)

    def __init__(self, model: Path, threads: int) -> None:
        llama.llama_backend_init()
        parameters = llama.llama_model_default_params()
        self._model = _made(llama.llama_model_load_from_file(str(model).encode(), parameters), "a model")
        self._threads = threads
        self._shape = (0, 0, 0)
        self._rows: Rows | None = None

    def prefill(self, tokens: int) -> float:
        rows = self._rows_of((tokens, 1, 1))
        return seconds_of(lambda: rows.prompt(tokens))

    def decode(self, context: int, batch: int, steps: int) -> float:
        is_new = (context, batch, steps) != self._shape
        rows = self._rows_of((context, batch, steps))
        if is_new:
            rows.prompt(context)
            rows.spread()
        return seconds_of(lambda: rows.decode(context, steps)) / steps

    def _rows_of(self, shape: tuple[int, int, int]) -> Rows:
        if self._rows is None or self._shape != shape:
            if self._rows is not None:
                self._rows.close()
            context, batch, steps = self._shape = shape
            self._rows = Rows(self._model, batch, context + steps, self._threads)
        return self._rows


def _batch(places: Iterable[_Place], outputs: int) -> Any:
    places = list(places)
    batch = llama.llama_batch_init(len(places), 0, 1)
    batch.n_tokens = len(places)
    for index, (row, position) in enumerate(places):
        batch.token[index], batch.pos[index] = _ANY_TOKEN, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
        batch.logits[index] = index >= len(places) - outputs
    return batch


def _made(thing: Any, name: str) -> Any:
    if not thing:
        sys.exit(f"llama.cpp could not make {name}")
    return thing


def load(model: Path, threads: int) -> LlamaEngine:
    return LlamaEngine(model, threads)


if __name__ == "__main__":
    serve(load)
