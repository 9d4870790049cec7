"""Exact answers of the built-in model on scenes it has never seen, by kind of question and language.

python bench/builtin_accuracy.py --scenes 4000
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import track

import visualglm
from visualglm.model import VisualGLM
from visualglm.scenes.held_out import Answered, answer_scenes
from visualglm.scenes.wording import KINDS, LANGUAGES

Cell = tuple[str, str]
model: VisualGLM
SCENES_AT_ONCE = 64


def load_model(path: Path | None, dtype: str) -> None:
    """In each process of its own, which runs a model of this size on one thread."""
    global model
    model = visualglm.load(path, backend="onnx", dtype=dtype)


def answer(scenes: range) -> list[Answered]:
    """By the model of this process."""
    return answer_scenes(model, scenes)


def ask(path: Path | None, dtype: str, scenes: int, processes: int) -> list[Answered]:
    """What a model says to every question about the first `scenes` unseen scenes, by several processes."""
    chunks = [range(first, min(first + SCENES_AT_ONCE, scenes)) for first in range(0, scenes, SCENES_AT_ONCE)]
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=load_model, initargs=(path, dtype)
    ) as pool:
        answered = pool.map(answer, chunks)
        shown = track(answered, "asking", len(chunks), console=Console(stderr=True))
        return [pair for chunk in shown for pair in chunk]


def count(answered: Sequence[Answered]) -> tuple[Counter[Cell], Counter[Cell]]:
    """Questions asked and answered rightly, by kind and language."""
    asked = Counter((question.kind, question.language) for question, _ in answered)
    right = Counter((question.kind, question.language) for question, said in answered if said == question.answer)
    return Counter(asked), Counter(right)


def table(asked: Counter[Cell], right: Counter[Cell]) -> Iterator[str]:
    """Markdown: a row a kind, a column a language, and the totals."""
    yield "| kind | " + " | ".join(LANGUAGES) + " | both | questions |"
    yield "|---|" + "---|" * (len(LANGUAGES) + 2)
    for kind in (*KINDS, "all"):
        kinds = KINDS if kind == "all" else (kind,)
        by_language = [[(each, language) for each in kinds] for language in LANGUAGES]
        groups = [*by_language, [cell for cells in by_language for cell in cells]]
        totals = [(sum(right[cell] for cell in cells), sum(asked[cell] for cell in cells)) for cells in groups]
        shares = " | ".join(f"{100 * hits / max(1, count):.1f} %" for hits, count in totals)
        yield f"| {kind} | {shares} | {totals[-1][1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory; else the built-in model")
    parser.add_argument("--dtype", default="auto", help="precision of the export that is asked")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="show the first N wrong answers")
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args()
    answered = ask(options.model, options.dtype, options.scenes, options.processes)
    asked, right = count(answered)
    print(f"{options.scenes} unseen scenes, onnx on cpu, {options.dtype}\n")
    print("\n".join(table(asked, right)))
    wrong = (
        f"{question.question} → {said!r}, not {question.answer!r}"
        for question, said in answered
        if said != question.answer
    )
    print("\n".join(list(wrong)[: options.wrong]))
    if options.json:
        counts = {f"{kind} {language}": [right[kind, language], asked[kind, language]] for kind, language in asked}
        options.json.write_text(json.dumps(counts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
