"""Worker of `engines.py` for chatglm.cpp: `worker_chatglm.py MODEL THREADS`.

It takes as many threads as it is told that the machine has cores: THREADS reaches it through `HARDWARE_CONCURRENCY`,
which a small library that is loaded before it reads (`setup_rivals.sh`).
"""

from __future__ import annotations

from pathlib import Path

import chatglm_cpp  # type: ignore[import-not-found]

from engine_worker import seconds_of, serve

_ANY_TOKEN = 100


class ChatGLMEngine:
    """One row at a time, and one cache: a prompt takes the place of the one before it."""

    abilities = ()

    def __init__(self, model: Path) -> None:
        self._pipeline = chatglm_cpp.Pipeline(str(model))
        self._greedy = chatglm_cpp._C.GenerationConfig(do_sample=False)
        self._prompt = 0

    def prefill(self, tokens: int) -> float:
        self._prompt = tokens
        return seconds_of(lambda: self._next_token(tokens, cached=0))

    def decode(self, context: int, batch: int, steps: int) -> float:
        if self._prompt != context:
            self.prefill(context)
        return seconds_of(lambda: self._steps(context, steps)) / steps

    def _steps(self, context: int, steps: int) -> None:
        for cached in range(context, context + steps):
            self._next_token(cached + 1, cached)

    def _next_token(self, tokens: int, cached: int) -> None:
        self._pipeline.model.generate_next_token([_ANY_TOKEN] * tokens, None, self._greedy, cached, self._prompt)


def load(model: Path, threads: int) -> ChatGLMEngine:
    return ChatGLMEngine(model)


if __name__ == "__main__":
    serve(load)
