"""`visualglm convert` and `check` with the files of MindFormers."""

from pathlib import Path

import numpy as np
import pytest

from tests.cli.program import Invoke
from visualglm.checkpoint.files import write_file
from visualglm.checkpoint.mindspore_ckpt import mindspore_pieces
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.tensors import LazyTensor


@pytest.fixture
def trio(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path) -> Path:
    assert invoke("convert", tiny_model_dir, tmp_path / "trio", "--to", "mindformers").code == 0
    return tmp_path / "trio"


@pytest.fixture
def lora(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A file as the recipe's training leaves it."""
    width = open_model_directory(tiny_model_dir).config.text.hidden_size
    name = "llm_model.transformer.layers.0.attention.dense.mindpet_delta_lora_"
    matrix = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
    arrays = {name + "a": matrix, name + "b": matrix.T}
    (tmp_path / "rank_0").mkdir()
    path = tmp_path / "rank_0" / "visualglm_rank_0-1500_1.ckpt"
    tensors = {key: LazyTensor("float32", array.shape, lambda a=array: a) for key, array in arrays.items()}
    write_file(path, mindspore_pieces(tensors))
    return path


def test_there_and_back(invoke: Invoke, tiny_model_dir: Path, trio: Path, tmp_path: Path) -> None:
    outcome = invoke("convert", trio, tmp_path / "back")
    assert outcome.out.splitlines()[0] == (f"source   {trio}: MindFormers checkpoint, q, k and v one after the other")
    ask = ("What is it?", "--max-new-tokens", 9)
    assert invoke("ask", "-m", tmp_path / "back", *ask).out == invoke("ask", "-m", tiny_model_dir, *ask).out


def test_they_can_be_checked_before_they_are_converted(invoke: Invoke, trio: Path) -> None:
    outcome = invoke("check", trio)
    assert outcome.code == 0 and "mindformers checkpoint, " in outcome.out
    (trio / "glm_6b.ckpt").write_bytes((trio / "glm_6b.ckpt").read_bytes()[:-1])
    outcome = invoke("check", trio)
    assert outcome.code == 1 and "is damaged: glm_6b.ckpt changed since SHA256SUMS was written" in outcome.out


def test_they_are_not_asked_as_they_are(invoke: Invoke, trio: Path) -> None:
    error = invoke("ask", "-m", trio, "What?").error
    assert "holds the files of MindFormers, and a model directory is needed; make one with `visualglm convert" in error
    error = invoke("ask", "-m", trio / "glm_6b.ckpt", "What?").error
    assert f"is a file; give the folder that it lies in, {trio}." in error


def test_lora_becomes_an_adapter(invoke: Invoke, tiny_model_dir: Path, lora: Path, tmp_path: Path) -> None:
    outcome = invoke("convert", lora, tmp_path / "adapter", "--base", tiny_model_dir)
    assert outcome.code == 0
    assert outcome.out.splitlines()[0] == f"source   {lora}: fine-tuned by MindFormers"
    assert "LoRA     1 layers, rank 1, scale 128," in outcome.out
    assert "Taken is lora_alpha 128, as the recipe has it; if yours was another" in outcome.err
    ask = ("-m", tiny_model_dir, "What is it?", "--max-new-tokens", 9)
    assert invoke("ask", "--adapter", tmp_path / "adapter", *ask).out != invoke("ask", *ask).out


def test_without_a_base(invoke: Invoke, lora: Path, tmp_path: Path) -> None:
    (lora.parent / "run_visualglm_lora.yaml").write_text(
        "model: {model_config: {text_config: {pet_config: {lora_alpha: 2, lora_rank: 1}}}}"
    )
    outcome = invoke("convert", lora, tmp_path / "adapter")
    assert "scale 2," in outcome.out and "Taken is" not in outcome.err
    assert "Warning: without --base MODEL the adapter does not know which model it belongs to." in outcome.err
    error = invoke("convert", lora, tmp_path / "other", "--to", "sat").error
    assert "holds an adapter, which has one format here" in error


def test_a_file_of_another_kind(invoke: Invoke, trio: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    error = invoke("convert", trio, tmp_path / "out", "--base", tiny_model_dir).error
    assert "holds no LoRA of another program, which is what --base is for" in error
