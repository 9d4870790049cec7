"""What whole numbers cost: exact answers, perplexity and logits of the built-in model's exports, by rounding.

python bench/export_accuracy.py --scenes 4000
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import visualglm
from builtin_accuracy import questions_about, run
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.export.onnx import ExportOptions, export_onnx
from visualglm.loading import builtin_path
from visualglm.model import VisualGLM
from visualglm.processing.image import preprocess
from visualglm.processing.layout import pad_batch
from visualglm.processing.prompt import build_prompt
from visualglm.scenes.dataset import HELD_OUT_SEEDS
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.scene import make_scene

FORMS = {
    "fp32": ExportOptions("fp32"),
    "fp32, int8 cache": ExportOptions("fp32", kv_cache="int8"),
    "int8, to nearest": ExportOptions("int8", method="rtn"),
    "int8": ExportOptions("int8"),
    "int4, to nearest": ExportOptions("int4", method="rtn"),
    "int4": ExportOptions("int4"),
    "int4, float32 cache": ExportOptions("int4", kv_cache="float32"),
}


@dataclass(frozen=True)
class Row:
    """What was measured of one export. logit_error: root mean square, as a share of that of the exact logits."""

    form: str
    exact: float
    right: int
    asked: int
    perplexity: float
    logit_error: float
    megabytes: float


def answer_logits(model: VisualGLM, scenes: range) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Logits [tokens, vocab] of the right answers to questions about each scene, and the tokens themselves."""
    text, tokenizer = model.config.text, model.tokenizer
    for index in scenes:
        picture = draw_scene(make_scene(HELD_OUT_SEEDS + index))
        pixels = preprocess(picture, model.config.vision.image_size)
        questions = list(questions_about(index))
        prompts = [
            build_prompt(
                tokenizer, model.config, each.question, has_image=True, language=each.language, max_new_tokens=64
            )
            for each in questions
        ]
        answers = [[*tokenizer.encode(each.answer), text.eos_token_id] for each in questions]
        layout = pad_batch(
            [(*prompt.input_ids, *answer) for prompt, answer in zip(prompts, answers, strict=True)],
            [prompt.image_start for prompt in prompts],
            pad_token_id=text.pad_token_id,
            bos_token_id=text.bos_token_id,
        )
        logits = model.logits(layout.input_ids, np.stack([pixels] * len(prompts)), layout.image_starts.tolist())
        for row, answer in zip(logits, answers, strict=True):
            yield row[-len(answer) - 1 : -1], np.array(answer)


def likelihood(model: VisualGLM, exact: VisualGLM, scenes: int) -> tuple[float, float]:
    """Perplexity of the right answers, and the error of their logits beside those of `exact`."""
    loss, tokens, error, energy = 0.0, 0, 0.0, 0.0
    both = zip(answer_logits(model, range(scenes)), answer_logits(exact, range(scenes)), strict=True)
    for (found, answer), (expected, _) in both:
        wide = found.astype(np.float64)
        peak = wide.max(axis=-1)
        normalizer = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=-1))
        loss += float((normalizer - wide[np.arange(len(answer)), answer]).sum())
        tokens += len(answer)
        error += float(np.square(found - expected).sum())
        energy += float(np.square(expected).sum())
    return float(np.exp(loss / tokens)), float(np.sqrt(error / energy))


def measure(form: str, folder: Path, exact: VisualGLM, scenes: int, processes: int) -> Row:
    """Export the built-in model in one of `FORMS` and ask it."""
    done = export_onnx(open_model_directory(builtin_path()), folder / form.replace(", ", "-"), FORMS[form])
    asked, right, _ = run(done.path, "auto", scenes, processes)
    perplexity, logit_error = likelihood(visualglm.load(done.path), exact, min(scenes, 500))
    hits, count = sum(right.values()), sum(asked.values())
    return Row(form, hits / count, hits, count, perplexity, logit_error, done.weights_bytes / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    exact, rows = visualglm.load(backend="onnx", dtype="float32"), []
    print("| export | exact answers | of | perplexity | error of logits | size |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for form in options.forms:
            row = measure(form, Path(scratch), exact, options.scenes, options.processes)
            rows.append(asdict(row))
            print(
                f"| {row.form} | {100 * row.exact:.2f} % | {row.asked} | {row.perplexity:.4f} "
                f"| {100 * row.logit_error:.2f} % | {row.megabytes:.1f} MB |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
