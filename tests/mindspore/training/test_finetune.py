"""Whole runs on a model of random weights: as torch learns, as many processes as one likes, stopped where one likes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import visualglm
from tests.training.test_finetune import Make, Recorder, StopHereError, log, recipe, rows, tensors  # noqa: F401
from visualglm.errors import ConfigError, DeviceError
from visualglm.training.finetune import finetune

ROOT = Path(__file__).parents[3]


def losses(output: Path) -> list[float]:
    return [row["losses"]["loss"] for row in log(output)]


def furthest(output: Path, other: Path) -> float:
    """How far the weights of two adapters lie apart at most."""
    arrays, others = tensors(output / "adapter"), tensors(other / "adapter")
    assert arrays.keys() == others.keys()
    return max(float(np.abs(array - others[name]).max()) for name, array in arrays.items())


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch") / "run"


@pytest.fixture
def torch_run(by_torch: Path, recipe: Make) -> Path:  # noqa: F811
    """The 20 steps of torch, made once."""
    if not by_torch.exists():
        finetune(recipe(run__keep_checkpoints=3, run__checkpoint_every=10), by_torch, device="cpu")
    return by_torch


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_twenty_steps_are_those_of_torch(tmp_path: Path, recipe: Make, torch_run: Path, compiled: bool) -> None:  # noqa: F811
    recorder = Recorder()
    asked = recipe(run__checkpoint_every=10)
    finetune(asked, tmp_path / "run", backend="mindspore", device="cpu", compiled=compiled, ui=recorder)
    rows_, others = log(tmp_path / "run"), log(torch_run)
    assert len(rows_) == len(others) == 20
    for row, other in zip(rows_, others, strict=True):
        assert row["losses"]["loss"] == pytest.approx(other["losses"]["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert (row["weight"], row["learning_rate"]) == (other["weight"], other["learning_rate"])
        assert row.get("validation") == pytest.approx(other.get("validation"), abs=1e-5)
    assert others[0]["losses"]["loss"] - others[-1]["losses"]["loss"] > 0.1
    assert furthest(tmp_path / "run", torch_run) < 1e-4
    assert recorder.tables[0][1][0] == "LoRA on qkv, proj (rank 10, alpha 128)"


def test_a_resumed_run_is_bit_equal_to_one_never_stopped(tmp_path: Path, recipe: Make) -> None:  # noqa: F811
    asked = recipe(data__workers=2, tune__lora_dropout=0.2, run__checkpoint_every=4, run__batch_size=3, run__steps=12)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finetune(asked, whole, backend="mindspore", device="cpu")
    with pytest.raises(StopHereError):  # in its second epoch of 8 steps
        finetune(asked, stopped, backend="mindspore", device="cpu", ui=Recorder(stop_at=11))
    recorder = Recorder()
    finetune(asked, stopped, resume=True, backend="mindspore", device="cpu", ui=recorder)
    assert "Going on from step 8 of 12." in recorder.notes
    for name in ("adapter/adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize("order", [("torch", "mindspore"), ("mindspore", "torch")])
def test_a_run_goes_on_where_the_other_library_stopped(
    tmp_path: Path,
    recipe: Make,  # noqa: F811
    torch_run: Path,
    order: tuple[str, str],
) -> None:
    asked = recipe(run__checkpoint_every=10)
    first, then = order
    with pytest.raises(StopHereError):
        finetune(asked, tmp_path, backend=first, device="cpu", compiled=False, ui=Recorder(stop_at=11))  # type: ignore[arg-type]
    recorder = Recorder()
    finetune(asked, tmp_path, resume=True, backend=then, device="cpu", compiled=False, ui=recorder)  # type: ignore[arg-type]
    assert "Going on from step 10 of 20." in recorder.notes
    assert losses(tmp_path) == pytest.approx(losses(torch_run), abs=1e-5)
    assert furthest(tmp_path, torch_run) < 1e-4


def test_checkpoints_hold_the_same_of_either_library(tmp_path: Path, recipe: Make, torch_run: Path) -> None:  # noqa: F811
    finetune(recipe(run__steps=1), tmp_path, backend="mindspore", device="cpu", compiled=False)
    own, others = tmp_path / "checkpoints/step-00000001", torch_run / "checkpoints/step-00000020"
    for name in ("weights.safetensors", "optimizer.safetensors"):
        arrays, expected = load_file(own / name), load_file(others / name)
        assert {key: (array.dtype, array.shape) for key, array in arrays.items()} == {
            key: (array.dtype, array.shape) for key, array in expected.items()
        }


def test_adapters_answer_alike_whoever_trained_them(tmp_path: Path, recipe: Make, torch_run: Path) -> None:  # noqa: F811
    adapter = finetune(recipe(), tmp_path / "run", backend="mindspore", device="cpu", compiled=False)
    model = recipe().model
    ours, theirs, plain = (
        visualglm.load(model, backend="torch", device="cpu", adapter=path)
        for path in (adapter, torch_run / "adapter", None)
    )
    picture = recipe().data.train.parent / "1.png"
    question = "what is it?"
    answers = [loaded.ask(picture, question, max_new_tokens=8) for loaded in (ours, theirs, plain)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("method", ["ptuning", "lora,qformer", "qlora", "full"])
def test_what_is_not_trained_here_is_told(tmp_path: Path, recipe: Make, method: str) -> None:  # noqa: F811
    sentence = rf"The MindSpore side trains lora, and tune\.methods names {method.removeprefix('lora,')}; use"
    with pytest.raises(ConfigError, match=sentence):
        finetune(recipe(tune__methods=method), tmp_path / "out", backend="mindspore", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_device_or_precision_that_is_not_there_is_told(
    tmp_path: Path,
    recipe: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DeviceError, match="'ascend:0' cannot be used by the installed MindSpore"):
        finetune(recipe(), tmp_path / "out", backend="mindspore", device="ascend")
    with pytest.raises(DeviceError, match="no bfloat16 on a CPU"):
        finetune(recipe(run__precision="bfloat16"), tmp_path / "out", backend="mindspore", device="cpu")
    monkeypatch.setenv("RANK_TABLE_FILE", "hccl_8p_01234567_10.0.0.1.json")
    with pytest.raises(DeviceError, match="is one of Ascend devices, and this process computes on the CPU; unset it"):
        finetune(recipe(), tmp_path / "out", backend="mindspore", device="cpu")
    assert not (tmp_path / "out").exists()
