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
    """40 rows: every other about a picture."""
    picture_of(0).save(tmp_path / "scene.png")
    rows: list[dict[str, str]] = [{"prompt": f"What is {number}?", "label": f"{number} cats"} for number in range(40)]
    for number, row in enumerate(rows):
        if number % 2:
            row["img"] = "scene.png"
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
    assert sum(group.layout.batch_size for group in calibrated) == 36
    assert sum(group.layout.batch_size for group in judged) == 4
    assert sum(group.layout.batch_size for batch in source.to_judge(2) for group in batch.groups) == 2
    assert all(answer_columns(group.layout).any(axis=1).all() for group in judged)


@pytest.mark.parametrize(("count", "learnt", "judged"), [(2, 1, 1), (7, 6, 1), (10, 9, 1), (19, 18, 1), (20, 18, 2)])
def test_of_few_rows_the_last_is_kept(directory: ModelDirectory, tmp_path: Path, count: int, learnt: int, judged: int):
    rows = [{"prompt": f"What is {number}?", "label": "a cat"} for number in range(count)]
    source = examples_for(directory, write(tmp_path / "rows.jsonl", rows))
    assert source is not None
    found = [
        sum(group.layout.batch_size for batch in examples for group in batch.groups)
        for examples in (source.to_calibrate(), source.to_judge(100))
    ]
    assert found == [learnt, judged]


def test_each_answer_of_a_conversation_is_an_example_beside_the_same_picture(directory: ModelDirectory, tmp_path: Path):
    picture_of(0).save(tmp_path / "scene.png")
    rows = [{"img": "scene.png", "conversations": [["What?", "A cat"], ["Where?", "There"]]} for _ in range(3)]
    source = examples_for(directory, write(tmp_path / "rows.jsonl", rows))
    assert source is not None
    (learnt,), (judged,) = source.to_calibrate(), source.to_judge(100)
    assert learnt.pixels.shape[0] == judged.pixels.shape[0] == 1
    assert learnt.groups[0].scene_index.tolist() == [0] * 4 and judged.groups[0].scene_index.tolist() == [0] * 2
    first, second = judged.groups[0].layout.context_lengths
    assert second > first
    assert answer_columns(judged.groups[0].layout).any(axis=1).all()


def test_pictures_are_read_from_beside_the_file(directory: ModelDirectory, row_file: Path):
    source = examples_for(directory, row_file)
    assert source is not None
    batch = next(source.to_calibrate())
    assert batch.pixels.shape == (1, 3, 28, 28)
    assert batch.groups[0].scene_index.tolist() == [-1, 0] * 4
    assert (batch.groups[0].layout.image_starts >= 0).tolist() == [False, True] * 4


def test_large_files_are_thinned_out(directory: ModelDirectory, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"{number}?", "label": "x"} for number in range(1200)])
    source = examples_for(directory, rows)
    assert source is not None
    assert sum(group.layout.batch_size for batch in source.to_calibrate() for group in batch.groups) == 360


def test_one_row_alone_is_refused(directory: ModelDirectory, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "x", "label": "y"}])
    with pytest.raises(DataError) as caught:
        examples_for(directory, path)
    assert str(caught.value) == f"{path} has one row alone, which would be kept to judge by; write more of them."


def test_all_bad_rows_are_told(directory: ModelDirectory, tmp_path: Path):
    bad = [
        {"img": "a.png"},
        {"prompt": "x", "label": 5},
        {"prompt": "x"},
        {"img": "missing.png", "prompt": "x", "label": "y"},
        {"img": "rows.jsonl", "prompt": "x", "label": "y"},
        {"img": "https://example.org/a.png", "prompt": "x", "label": "y"},
        {"prompt": "long " * 300, "label": "y"},
        {"conversations": []},
    ]
    path = write(tmp_path / "rows.jsonl", [{"prompt": "x", "label": "y"}, *bad])
    with pytest.raises(DataError) as caught:
        examples_for(directory, path)
    head, *told = str(caught.value).split("\n")
    assert head == f"{path} has 8 bad rows of 9:"
    expected = (
        "line 2: there is no prompt; write one",
        "line 3: the label is 5",
        "line 4: there is no label; write one",
        f"line 5: The image {tmp_path / 'missing.png'} does not exist",
        f"line 6: The image {path} ",
        'line 7: the image is "https://example.org/a.png", an address',
        "line 8: question 1 leaves no room for its answer",
        "line 9: conversations is []",
    )
    assert len(told) == len(expected)
    for sentence, start in zip(told, expected, strict=True):
        assert sentence.startswith(start), sentence
