"""What whole numbers cost: exact answers, perplexity and logits of the built-in model's exports, by rounding.

python bench/export_accuracy.py --scenes 4000
python bench/export_accuracy.py --same-as-torch 500
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import visualglm
from builtin_accuracy import ask
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.export.accuracy import (
    AnswerFigures,
    LogitFigures,
    answer_logits,
    answer_tokens,
    compare_answers,
    compare_logits,
)
from visualglm.export.examples import DrawnScenes
from visualglm.export.onnx import ExportOptions, export_onnx
from visualglm.loading import builtin_path
from visualglm.model import VisualGLM
from visualglm.scenes.held_out import Answered, answer_ids

SENSITIVE = ("qkv", "lm_head")
FORMS = {
    "fp32": ExportOptions("fp32"),
    "fp32, int8 cache": ExportOptions("fp32", kv_cache="int8"),
    "int8, to nearest": ExportOptions("int8", method="rtn"),
    "int8, search": ExportOptions("int8"),
    "int8, gptq": ExportOptions("int8", method="gptq"),
    "int4, to nearest": ExportOptions("int4", method="rtn"),
    "int4, search": ExportOptions("int4"),
    "int4, gptq": ExportOptions("int4", method="gptq"),
    "int4, search, 8-bit qkv and lm_head": ExportOptions("int4", int8_layers=SENSITIVE),
    "int4, gptq, 8-bit qkv and lm_head": ExportOptions("int4", method="gptq", int8_layers=SENSITIVE),
    "int4, search, float32 cache": ExportOptions("int4", kv_cache="float32"),
}
# Their logits are compared; beside thousands of answers this would only take long.
MOST_LOGIT_SCENES = 500


@dataclass(frozen=True)
class Row:
    """What was measured of one export."""

    form: str
    answers: AnswerFigures
    logits: LogitFigures
    megabytes: float

    def __str__(self) -> str:
        """A row of the table."""
        answers, logits = self.answers, self.logits
        return (
            f"| {self.form} | {100 * answers.exact_match:.2f} % | {100 * answers.same_as_float32:.2f} % "
            f"| {logits.perplexity:.4f} | {logits.divergence:.1e} | {100 * logits.logit_error:.2f} % "
            f"| {self.megabytes:.1f} MB |"
        )


HEADER = (
    "| export | exact answers | same as fp32 | perplexity | divergence | error of logits | size |\n"
    "|---|---|---|---|---|---|---|"
)


def measure(
    form: str, folder: Path, float32: VisualGLM, float32_answers: list[Answered], scenes: int, processes: int
) -> Row:
    """Export the built-in model in one of `FORMS` and ask it."""
    done = export_onnx(open_model_directory(builtin_path()), folder / form.replace(", ", "-"), FORMS[form])
    answers = compare_answers(ask(done.path, "auto", scenes, processes), float32_answers)
    source, count = DrawnScenes(float32.config, float32.tokenizer), min(scenes, MOST_LOGIT_SCENES)
    logits = compare_logits(
        answer_logits(visualglm.load(done.path).backend, source.to_judge(count)),
        answer_logits(float32.backend, source.to_judge(count)),
        answer_tokens(source.to_judge(count)),
    )
    return Row(form, answers, logits, done.weights_bytes / 1e6)


def compare_with_torch(float32: VisualGLM, scenes: int) -> str:
    """How often torch answers with the very same ids, and how far its logits are off."""
    torch = visualglm.load(backend="torch", device="cpu", dtype="float32")
    ids = [answer_ids(model, range(scenes)) for model in (float32, torch)]
    same = sum(one == other for one, other in zip(*ids, strict=True))
    examples = DrawnScenes(float32.config, float32.tokenizer)
    logits = (answer_logits(model.backend, examples.to_judge(scenes)) for model in (float32, torch))
    off = max(float(np.abs(one - other).max()) for one, other in zip(*logits, strict=True))
    return f"{same} of {len(ids[0])} answers have the ids that torch gives; logits are off by up to {off:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    parser.add_argument("--same-as-torch", type=int, metavar="SCENES", help="compare the fp32 export with torch only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    float32 = visualglm.load(backend="onnx", dtype="float32")
    if options.same_as_torch:
        print(compare_with_torch(float32, options.same_as_torch))
        return
    float32_answers, rows = ask(None, "float32", options.scenes, options.processes), []
    print(f"{len(float32_answers)} questions about {options.scenes} unseen scenes\n\n{HEADER}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for form in options.forms:
            row = measure(form, Path(scratch), float32, float32_answers, options.scenes, options.processes)
            rows.append(asdict(row))
            print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
