"""Examples to calibrate on and to judge by: drawn ones, and those of a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.errors import DataError
from visualglm.export.examples import DrawnScenes, RowFile, answer_columns, examples_for
from visualglm.scenes.held_out import picture_of


@pytest.fixture(scope="module")
def directory(tiny_model_dir: Path) -> ModelDirectory:
    return open_model_directory(tiny_model_dir)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def row_file(tmp_path: Path) -> Path:
    """40 rows: every other about a picture, the last ten without an answer."""
    picture_of(0).save(tmp_path / "scene.png")
    rows: list[dict[str, str]] = [{"prompt": f"What is {number}?", "label": f"{number} cats"} for number in range(40)]
    for number, row in enumerate(rows):
        if number % 2:
            row["img"] = "scene.png"
        if number >= 30:
            del row["label"]
    return write(tmp_path / "rows.jsonl", rows)


def test_scenes_to_judge_by_are_those_of_every_count(builtin_model_dir: Path):
    source = examples_for(open_model_directory(builtin_model_dir), None)
    assert isinstance(source, DrawnScenes) and source.name == "drawn scenes"
    batches = list(source.to_judge(18))
    assert [len(batch.pixels) for batch in batches] == [16, 2]
    first, text = batches[0].groups[0], source.config.text
    ids = np.roll(first.layout.input_ids, -1, axis=1)[answer_columns(first.layout)]
    assert (ids == text.eos_token_id).sum() == first.layout.batch_size
    assert text.bos_token_id not in ids and text.pad_token_id not in ids
    seen = [batch.pixels for batch in source.to_calibrate()]
    assert sum(map(len, seen)) == 64
    judged = {picture.tobytes() for batch in batches for picture in batch.pixels}
    assert not judged & {picture.tobytes() for pixels in seen for picture in pixels}


def test_another_model_has_no_scenes(directory: ModelDirectory):
    assert examples_for(directory, None) is None


def test_every_tenth_answer_of_a_file_is_kept_to_judge_by(directory: ModelDirectory, row_file: Path):
    source = examples_for(directory, row_file)
    assert isinstance(source, RowFile) and source.name == "rows of rows.jsonl" and len(source.rows) == 40
    calibrated = [group for batch in source.to_calibrate() for group in batch.groups]
    judged = [group for batch in source.to_judge(100) for group in batch.groups]
    assert sum(group.layout.batch_size for group in calibrated) == 37
    assert sum(group.layout.batch_size for group in judged) == 3
    assert sum(group.layout.batch_size for batch in source.to_judge(2) for group in batch.groups) == 2
    assert all(answer_columns(group.layout).any(axis=1).all() for group in judged)
    told = [row for group in calibrated for row in answer_columns(group.layout).any(axis=1)]
    assert sum(told) == 27


def test_pictures_are_read_from_beside_the_file(directory: ModelDirectory, row_file: Path):
    source = examples_for(directory, row_file)
    assert source is not None
    batch = next(source.to_calibrate())
    assert batch.pixels.shape == (4, 3, 28, 28)
    assert batch.groups[0].scene_index.tolist() == [-1, 0, -1, 1, -1, 2, -1, 3]
    assert (batch.groups[0].layout.image_starts >= 0).tolist() == [False, True] * 4


def test_large_files_are_thinned_out(directory: ModelDirectory, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"{number}?"} for number in range(1100)])
    source = examples_for(directory, rows)
    assert source is not None
    assert sum(group.layout.batch_size for batch in source.to_calibrate() for group in batch.groups) == 367
    assert not list(source.to_judge(100))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", 'has no rows; write {"img": FILE'),
        ('{"prompt": "x", "label": "y"}\n{"prompt": \n', "rows.jsonl, line 2: this is no JSON"),
        ("[1]\n", "line 1: this is [1], not a JSON object"),
        ('{"img": "a.png"}\n', "line 1: the prompt is null; write a question."),
        ('{"prompt": " "}\n', 'line 1: the prompt is " "; write a question.'),
        ('{"prompt": "x", "label": 5}\n', "line 1: the label is 5; write the answer, or leave it out."),
        ('{"prompt": "x", "img": 5}\n', "line 1: the image is 5; write the path of a file."),
    ],
)
def test_malformed_files_are_refused(directory: ModelDirectory, tmp_path: Path, content: str, said: str):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        examples_for(directory, tmp_path / "rows.jsonl")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"img": "missing.png", "prompt": "x"}, r"line 1: .*missing.png does not exist"),
        ({"img": "rows.jsonl", "prompt": "x"}, r"line 1: .*is not an image"),
        ({"img": "https://example.org/a.png", "prompt": "x"}, r"line 1: .*URL"),
        ({"prompt": "long " * 300}, r"line 1: The question takes \d+ tokens"),
    ],
)
def test_rows_that_cannot_be_put_to_the_model_are_named(
    directory: ModelDirectory, tmp_path: Path, row: dict[str, str], said: str
):
    source = examples_for(directory, write(tmp_path / "rows.jsonl", [row]))
    assert source is not None
    with pytest.raises(DataError, match=said):
        list(source.to_calibrate())
