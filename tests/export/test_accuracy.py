"""What an export is judged by: figures worked by hand, the float32 export beside torch, and gains that are known."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import visualglm
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.export.accuracy import answer_logits, answer_tokens, compare_answers, compare_logits, judge
from visualglm.export.examples import examples_for
from visualglm.export.graphs import open_graphs, write_graphs
from visualglm.export.layerwise import LayerwiseModel
from visualglm.export.options import ExportOptions
from visualglm.export.rounding import Rounding
from visualglm.scenes.held_out import answer_ids, questions_about
from visualglm.scenes.questions import Question


def test_figures_of_logits_by_hand():
    exact = np.log(np.float32([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]))
    found = np.log(np.float32([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])) + 3
    figures = compare_logits([found[:1], found[1:]], [exact[:1], exact[1:]], [np.array([0]), np.array([1])])
    assert figures.answer_tokens == 2
    assert figures.perplexity == pytest.approx(1 / np.sqrt(0.25 * 0.1))
    assert figures.float32_perplexity == pytest.approx(1 / np.sqrt(0.5 * 0.1))
    assert figures.divergence == pytest.approx(0.25 * np.log(2) / 2)
    error = np.square(found - exact).sum() / np.square(exact).sum()
    assert figures.logit_error == pytest.approx(np.sqrt(error))


def test_figures_of_answers_by_hand():
    questions = [Question("count", "en", f"How many {number}?", "3") for number in range(4)]
    found = list(zip(questions, ["3", "3", "4", "5"], strict=True))
    exact = list(zip(questions, ["3", "4", "4", "3"], strict=True))
    figures = compare_answers(found, exact)
    assert (figures.questions, figures.exact_match, figures.float32_exact_match) == (4, 0.5, 0.5)
    assert figures.same_as_float32 == 0.5


def test_torch_and_the_float32_export_answer_with_the_same_ids(builtin_model_dir: Path):
    torch = visualglm.load(builtin_model_dir, backend="torch", device="cpu", dtype="float32")
    onnx = visualglm.load(backend="onnx", dtype="float32")
    scenes = range(20)
    found = answer_ids(onnx, scenes)
    assert found == answer_ids(torch, scenes)
    assert len(found) == sum(len(list(questions_about(scene))) for scene in scenes)


def test_float32_is_judged_to_be_itself(builtin_model_dir: Path, tmp_path: Path):
    directory, form = open_model_directory(builtin_model_dir), ExportOptions("fp32").form(visualglm.load().config)
    source = examples_for(directory, None)
    assert source is not None
    (tmp_path / "scratch").mkdir()
    write_graphs(tmp_path, directory, form)
    judgement = judge(tmp_path, directory, form, source, 3, tmp_path / "scratch")
    assert judgement is not None and judgement.answers is not None
    assert (judgement.examples, judgement.count) == ("drawn scenes", 3)
    assert judgement.logits.logit_error < 1e-5 and abs(judgement.logits.divergence) < 1e-8
    assert judgement.logits.perplexity == pytest.approx(judgement.logits.float32_perplexity, rel=1e-6)
    assert judgement.answers.same_as_float32 == 1
    assert judgement.answers.exact_match == judgement.answers.float32_exact_match > 0.9


def test_gptq_and_wider_layers_bring_logits_nearer_than_the_search(builtin_model_dir: Path, tmp_path: Path):
    """The cache is exact, so as not to blur it."""
    directory, exact = open_model_directory(builtin_model_dir), visualglm.load(backend="onnx").backend
    source = examples_for(directory, None)
    assert source is not None
    sensitive = ("qkv", "lm_head")
    forms = {
        "search": ExportOptions("int4", kv_cache="float32"),
        "gptq": ExportOptions("int4", kv_cache="float32", method="gptq"),
        "wider": ExportOptions("int4", kv_cache="float32", method="gptq", int8_layers=sensitive),
    }
    errors = {}
    for name, options in forms.items():
        form, folder = options.form(directory.config), tmp_path / name
        folder.mkdir()
        hessians = LayerwiseModel(directory, islice(source.to_calibrate(), 1), tmp_path) if name != "search" else None
        write_graphs(folder, directory, form, Rounding(form, options.method, hessians))
        backend = open_graphs(folder, directory, form)
        logits = (answer_logits(each, source.to_judge(4)) for each in (backend, exact))
        errors[name] = compare_logits(*logits, answer_tokens(source.to_judge(4))).logit_error
    assert errors["gptq"] < 0.7 * errors["search"]
    assert errors["wider"] < 0.4 * errors["search"]
