"""Exact answers of the built-in model on scenes it has never seen, by kind of question and language.

python bench/builtin_accuracy.py --scenes 4000
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

import visualglm
from visualglm.model import VisualGLM
from visualglm.scenes.dataset import HELD_OUT_SEEDS
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.questions import Question, ask_about
from visualglm.scenes.scene import make_scene
from visualglm.scenes.wording import KINDS, LANGUAGES

Cell = tuple[str, str]
model: VisualGLM
SCENES_AT_ONCE = 64


def questions_about(index: int) -> Iterator[Question]:
    """One question of each kind where the scene allows it, half of them in one language and half in the other."""
    scene = make_scene(HELD_OUT_SEEDS + index)
    rng = np.random.default_rng([HELD_OUT_SEEDS, index])
    for place, kind in enumerate(KINDS):
        question = ask_about(scene, kind, LANGUAGES[(index + place) % 2], rng)
        if question is not None:
            yield question


def load_model(path: Path | None, dtype: str) -> None:
    """In each process of its own, which runs a model of this size on one thread."""
    global model
    model = visualglm.load(path, backend="onnx", dtype=dtype)


def score(indices: range) -> tuple[Counter[Cell], Counter[Cell], list[str]]:
    """Questions asked and answered rightly, by kind and language, and the wrong answers."""
    images = model.encode_images([draw_scene(make_scene(HELD_OUT_SEEDS + index)) for index in indices])
    rows = [
        (image, question) for image, index in zip(images, indices, strict=True) for question in questions_about(index)
    ]
    answers = model.ask_batch(
        [(image, question.question) for image, question in rows], batch_size=256, max_new_tokens=64
    )
    checked = [(question, answer) for (_, question), answer in zip(rows, answers, strict=True)]
    asked: Counter[Cell] = Counter((question.kind, question.language) for question, _ in checked)
    right: Counter[Cell] = Counter(
        (question.kind, question.language) for question, answer in checked if answer == question.answer
    )
    wrong = [
        f"{question.question} → {answer!r}, not {question.answer!r}"
        for question, answer in checked
        if answer != question.answer
    ]
    return asked, right, wrong


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


def run(path: Path | None, dtype: str, scenes: int, processes: int) -> tuple[Counter[Cell], Counter[Cell], list[str]]:
    """As `score`, for the first `scenes` unseen scenes, by several processes."""
    asked: Counter[Cell] = Counter()
    right: Counter[Cell] = Counter()
    wrong: list[str] = []
    chunks = [range(first, min(first + SCENES_AT_ONCE, scenes)) for first in range(0, scenes, SCENES_AT_ONCE)]
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=load_model, initargs=(path, dtype)
    ) as pool:
        scored = pool.map(score, chunks)
        for more_asked, more_right, more_wrong in track(scored, "asking", len(chunks), console=Console(stderr=True)):
            asked += more_asked
            right += more_right
            wrong += more_wrong
    return asked, right, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory; else the built-in model")
    parser.add_argument("--dtype", default="auto", help="precision of the export that is asked")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="show the first N wrong answers")
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args()
    asked, right, wrong = run(options.model, options.dtype, options.scenes, options.processes)
    print(f"{options.scenes} unseen scenes, onnx on cpu, {options.dtype}\n")
    print("\n".join(table(asked, right)))
    print("\n".join(wrong[: options.wrong]))
    if options.json:
        counts = {f"{kind} {language}": [right[kind, language], asked[kind, language]] for kind, language in asked}
        options.json.write_text(json.dumps(counts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
