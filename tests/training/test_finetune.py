"""Whole runs on a model of random weights: as many processes as one likes, stopped where one likes, one result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

import visualglm
from tests.adapters import write_random_adapter
from visualglm.checkpoint.adapter_dir import open_adapter
from visualglm.checkpoint.model_dir import open_model_directory, write_model_directory
from visualglm.errors import CheckpointError, ConfigError, DataError, TokenizerError
from visualglm.training.finetune import finetune
from visualglm.training.launch import launch
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.recipe_file import RECIPE_NAME, read_recipe, recipe_to_yaml

ROWS = 26
# No schedule that only creeps: the weights must move for a comparison to mean something.
FAST = {"optimizer.learning_rate": 1e-3, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
Settings = dict[str, object]


class StopHereError(Exception):
    pass


class Recorder:
    """A user who remembers what is told, and may stop the run at some step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.tables: list[list[tuple[str, ...]]] = []
        self.titles: list[str] = []
        self._stop_at = stop_at

    def tell(self, text: str) -> None:
        self.notes.append(text)

    def show_table(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        self.tables.append([tuple(header), *(tuple(row) for row in rows)])

    def row_progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        self.titles.append(title)
        return nullcontext(lambda done, total: None)

    def byte_progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return self.row_progress(title)

    def noted_progress(self, title: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        return nullcontext(self._step)

    def _step(self, done: int, total: int, note: str) -> None:
        if done == self._stop_at:
            raise StopHereError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of unequal length; every fourth has no image."""
    folder = tmp_path_factory.mktemp("rows")
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(ROWS):
            row: dict[str, object] = {"prompt": "what is it?", "label": "a cat " * (1 + number * number % 13)}
            if number % 4:
                Image.new("RGB", (30, 30), (9 * number, 0, 90)).save(folder / f"{number}.png")
                row["img"] = f"{number}.png"
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture
def recipe(rows: Path, tiny_model_dir: Path) -> Callable[..., FinetuneRecipe]:
    """A recipe of 20 steps of 4 rows with what is given set: `tune__lora_rank=3`."""

    def make(**settings: object) -> FinetuneRecipe:
        given = {name.replace("__", "."): value for name, value in settings.items()}
        base: Settings = {"model": tiny_model_dir, "data.train": rows, "run.steps": 20, "run.log_every": 1, **FAST}
        return read_recipe(None, {**base, "data.workers": 0, "tune.layer_range": "all", **given})

    return make


def tensors(adapter: Path) -> dict[str, NDArray[Any]]:
    return {name: array for file in sorted(adapter.glob("*.safetensors")) for name, array in load_file(file).items()}


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def run_in_two_processes(recipe: FinetuneRecipe, output: Path) -> None:
    path = output.with_suffix(".yaml")
    path.write_text(recipe_to_yaml(recipe))
    assert launch(["-m", "visualglm.cli", "finetune", str(path), "--output", str(output), "--device", "cpu"], 2) == 0


def require_same_run(output: Path, other: Path) -> None:
    """Losses within 1e-6, of training and validation, and weights within 1e-5, after they have moved."""
    rows, others = log(output), log(other)
    assert len(rows) == len(others) == 20
    for row, also in zip(rows, others, strict=True):
        assert row["weight"] == also["weight"]
        assert row["losses"]["loss"] == pytest.approx(also["losses"]["loss"], abs=1e-6)
        assert row.get("validation") == pytest.approx(also.get("validation"), abs=1e-6)
    arrays, other_arrays = tensors(output / "adapter"), tensors(other / "adapter")
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, other_arrays[name], atol=1e-5, rtol=0, err_msg=name)


Make = Callable[..., FinetuneRecipe]


@pytest.mark.parametrize("method", ["lora", "qformer"])
def test_two_processes_and_batches_of_one_are_as_one_process(tmp_path: Path, recipe: Make, method: str) -> None:
    # What is trained as a whole has parameters whose gradients are all noise, such as the bias of keys.
    settings: Settings = {"tune__methods": method, "optimizer__learning_rate": 1e-3 if method == "lora" else 2e-5}
    finetune(recipe(run__batch_size=4, **settings), tmp_path / "one", device="cpu")
    finetune(recipe(run__batch_size=1, run__accumulation=4, **settings), tmp_path / "four", device="cpu")
    require_same_run(tmp_path / "one", tmp_path / "four")
    if method == "lora":
        run_in_two_processes(recipe(run__batch_size=2, **settings), tmp_path / "two")
        require_same_run(tmp_path / "one", tmp_path / "two")
    assert len({row["weight"] for row in log(tmp_path / "one")}) > 5  # steps of unequal weight


def test_a_model_split_over_two_processes_learns_what_one_learns(tmp_path: Path, recipe: Make) -> None:
    settings: Settings = {"tune__methods": "full", "optimizer__learning_rate": 2e-5}
    finetune(recipe(run__batch_size=4, **settings), tmp_path / "one", device="cpu")
    run_in_two_processes(recipe(run__batch_size=2, **settings), tmp_path / "two")
    require_same_run(tmp_path / "one", tmp_path / "two")
    checkpoint = tmp_path / "two/checkpoints/step-00000020"
    assert (checkpoint / "weights-of-rank-1.safetensors").is_file()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_bit_equal_to_one_never_stopped(tmp_path: Path, recipe: Make, workers: int) -> None:
    asked = recipe(
        data__workers=workers, tune__lora_dropout=0.2, run__checkpoint_every=4, run__batch_size=3, run__steps=12
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finetune(asked, whole, device="cpu")
    for stop_at in (7, 11):  # an epoch has 8 steps
        with pytest.raises(StopHereError):
            finetune(asked, stopped, resume=True, device="cpu", ui=Recorder(stop_at))
    recorder = Recorder()
    finetune(asked, stopped, resume=True, device="cpu", ui=recorder)
    assert "Going on from step 8 of 12." in recorder.notes
    for name in ("adapter", "best"):
        files = sorted(path.name for path in (whole / name).iterdir())
        assert [(stopped / name / file).read_bytes() for file in files] == [
            (whole / name / file).read_bytes() for file in files
        ]
    seconds = {"seconds": 0}
    assert [row | seconds for row in log(stopped)] == [row | seconds for row in log(whole)]


def test_before_the_first_step_it_is_told_what_is_trained_and_what_it_takes(tmp_path: Path, recipe: Make) -> None:
    recorder = Recorder()
    qlora = {"tune__methods": ("qlora",), "tune__base_bits": 8}
    finetune(recipe(run__steps=2, tune__lora_rank=3, **qlora), tmp_path / "out", device="cpu", ui=recorder)
    width = 32
    parameters = 2 * 3 * ((width + 3 * width) + (width + width))
    assert recorder.tables == [
        [
            ("trained", "layers", "parameters"),
            ("LoRA on qkv, proj (rank 3, alpha 128)", "0, 1", f"{parameters:,}"),
        ]
    ]
    assert recorder.titles[-1] == "loading the model in 8 bits"
    told = "\n".join(recorder.notes)
    assert f"{parameters:,} parameters are trained, " in told
    assert "Memory: " in told
    assert "are free on cpu, in float32." in told
    assert "23 answers to learn, 3 held out; 2 steps, 6 an epoch, in one process." in told
    assert "have no image" in told


def test_what_a_run_leaves(tmp_path: Path, recipe: Make) -> None:
    output = tmp_path / "out"
    asked = recipe(run__steps=9, run__validate_every=3, run__checkpoint_every=2, run__log_every=2)
    assert finetune(asked, output, device="cpu") == output / "adapter"
    assert read_recipe(output / RECIPE_NAME) == asked
    rows = log(output)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9]
    validated = {row["step"]: row["validation"]["loss"] for row in rows if "validation" in row}
    assert list(validated) == [3, 6, 9]
    best = open_adapter(output / "best").manifest
    assert best is not None
    assert best.settings["step"] == min(validated, key=lambda step: validated[step])
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000008", "step-00000009"]
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "runs").iterdir())


@pytest.mark.parametrize("method", ["lora,qformer", "qlora", "ptuning", "vit", "full"])
def test_what_any_method_trains_can_be_asked(
    tmp_path: Path, recipe: Make, tiny_model_dir: Path, rows: Path, method: str
) -> None:
    asked = recipe(tune__methods=method, run__steps=2, run__activation_checkpointing=True)
    adapter = finetune(asked, tmp_path / "out", device="cpu")
    plain = visualglm.load(tiny_model_dir, backend="torch", device="cpu")
    tuned = visualglm.load(tiny_model_dir, backend="torch", device="cpu", adapter=adapter)
    ids = np.array([[*range(20, 30), plain.config.text.gmask_token_id, plain.config.text.bos_token_id]])
    assert np.abs(tuned.logits(ids) - plain.logits(ids)).max() > 1e-6 or method == "vit"
    tuned.ask(rows.parent / "1.png", "what is it?", max_new_tokens=2)


def test_images_are_encoded_once_for_all_runs(tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUALGLM_CACHE", str(tmp_path / "cache"))
    first, second, third = Recorder(), Recorder(), Recorder()
    finetune(recipe(run__steps=2), tmp_path / "1", device="cpu", ui=first)
    finetune(recipe(run__steps=2), tmp_path / "2", device="cpu", ui=second)
    finetune(recipe(run__steps=2, data__cache_images=False), tmp_path / "3", device="cpu", ui=third)
    assert first.titles == ["checking rows", "encoding images", "loading the model"]
    assert second.titles == third.titles == ["checking rows", "loading the model"]
    # Computed from what is read back, and not: the same, since it is kept in float32.
    assert log(tmp_path / "3")[1]["losses"]["loss"] == pytest.approx(log(tmp_path / "2")[1]["losses"]["loss"], abs=1e-5)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, recipe: Make) -> None:
    asked = recipe(run__steps=12, run__checkpoint_every=5, tune__lora_dropout=0.1)
    whole, full = tmp_path / "whole", tmp_path / "full"
    finetune(asked, whole, device="cpu")
    (tmp_path / "asked.yaml").write_text(recipe_to_yaml(asked))
    script = f"""
import resource, sys
from pathlib import Path
from visualglm.errors import VisualGLMError
from visualglm.training.finetune import Silent, finetune
from visualglm.training.recipe_file import read_recipe
from contextlib import nullcontext

class FullDisk(Silent):
    def noted_progress(self, title):
        return nullcontext(self.step)
    def step(self, done, total, note):
        if done == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

try:
    finetune(read_recipe(Path({str(tmp_path / "asked.yaml")!r})), Path({str(full)!r}), device="cpu", ui=FullDisk())
except VisualGLMError as error:
    sys.exit(str(error))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1
    assert "step-00000010 could not be written" in run.stderr
    assert [path.name for path in (full / "checkpoints").iterdir()] == ["step-00000005"]
    finetune(asked, full, resume=True, device="cpu")
    name = "adapter/adapter_model.safetensors"
    assert (full / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tune__lora_rank": 3}, "another recipe (tune.lora_rank was 10 and is 3); resume with that one"),
        (
            {"optimizer__learning_rate": 2e-3, "run__seed": 4},
            "(optimizer.learning_rate was 0.001 and is 0.002, run.seed",
        ),
    ],
)
def test_a_run_goes_on_with_its_own_recipe_only(tmp_path: Path, recipe: Make, changes: Settings, sentence: str) -> None:
    output = tmp_path / "out"
    finetune(recipe(run__steps=3), output, device="cpu")
    before = (output / RECIPE_NAME).read_bytes()
    with pytest.raises(ConfigError) as raised:
        finetune(recipe(run__steps=3, **changes), output, resume=True, device="cpu")
    assert sentence in str(raised.value)
    assert (output / RECIPE_NAME).read_bytes() == before


def test_a_run_does_not_go_on_with_other_rows_or_another_model(
    tmp_path: Path, recipe: Make, rows: Path, tiny_model_dir: Path, builtin_model_dir: Path
) -> None:
    copied = shutil.copytree(rows.parent, tmp_path / "rows")
    moved = copied / rows.name
    output = tmp_path / "out"
    finetune(recipe(run__steps=3), output, device="cpu")
    assert finetune(
        recipe(run__steps=3, data__train=moved), output, resume=True, device="cpu"
    )  # it only lies elsewhere
    moved.write_text(moved.read_text().replace("cat", "dog", 1))
    with pytest.raises(ConfigError, match=r"another recipe \(data.train \(its content\) was"):
        finetune(recipe(run__steps=3, data__train=moved), output, resume=True, device="cpu")
    with pytest.raises(ConfigError, match=r"another recipe \(model \(its fingerprint\) was"):
        finetune(recipe(run__steps=3, model=builtin_model_dir), output, resume=True, device="cpu")


def test_a_run_is_not_overwritten(tmp_path: Path, recipe: Make) -> None:
    finetune(recipe(run__steps=1), tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match="holds a run already; --resume goes on with it, or give another folder"):
        finetune(recipe(run__steps=1), tmp_path / "out", device="cpu")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; give a folder"):
        finetune(recipe(run__steps=1), tmp_path / "file", device="cpu")


def test_an_adapter_is_no_model_to_begin_with(tmp_path: Path, recipe: Make, tiny_model_dir: Path) -> None:
    (tmp_path / "my run").mkdir()
    adapter = write_random_adapter(tmp_path / "my run" / "adapter", tiny_model_dir).path
    (adapter.parent / RECIPE_NAME).touch()
    for given, said in ((adapter, "is an adapter, and"), (adapter.parent, f"with the adapter {adapter}, and")):
        with pytest.raises(CheckpointError) as caught:
            finetune(recipe(model=given), tmp_path / "out", device="cpu")
        assert str(caught.value).startswith(f"{given} is ") and said in str(caught.value)
        assert f"belongs to, or merge both with `visualglm merge MODEL '{adapter}' OUT`, and" in str(caught.value)
        assert "--adapter" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_told_before_anything_is_written(tmp_path: Path, recipe: Make, tiny_model_dir: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"img": "none.png", "prompt": "a", "label": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"(?s)line 1.*line 2"):
        finetune(recipe(data__train=bad), tmp_path / "out", device="cpu")
    mute = tmp_path / "mute"
    write_model_directory(mute, replace(open_model_directory(tiny_model_dir).checkpoint, tokenizer_path=None))
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.model, so it cannot learn words"):
        finetune(recipe(model=mute), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_leaves_no_adapter(tmp_path: Path, recipe: Make) -> None:
    diverging = recipe(optimizer__learning_rate=1e30)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"The training has diverged: .* is nan, so no adapter was written"):
            finetune(diverging, tmp_path / "run", resume=resume)
        assert not (tmp_path / "run/adapter").exists() and (tmp_path / "run/log.jsonl").is_file()
