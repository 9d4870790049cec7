"""What `caption` must not destroy, and what it must not leave."""

import errno
import json
import os
from pathlib import Path

import pytest

from tests.cli.program import Invoke
from visualglm.cli.row_log import RowLog
from visualglm.errors import DataError

LINE = '{"prompt": "What?"}\n'


def test_the_sidecar_is_not_put_over_other_files(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    source, out = tmp_path / "q.jsonl.meta.json", tmp_path / "q.jsonl"
    source.write_text(LINE)
    assert "is the input" in invoke("caption", source, "-o", out, "-m", tiny_model_dir).error
    (tmp_path / "in.jsonl").write_text(LINE)
    for options in ((), ("--overwrite",)):
        error = invoke("caption", tmp_path / "in.jsonl", "-o", out, "-m", tiny_model_dir, *options).error
        assert "does not belong to" in error
    assert source.read_text() == LINE and not out.exists()


def test_a_full_disk_leaves_the_old_rows_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "c.jsonl"
    with RowLog(path, {}) as log:
        log.append([{"row": 1}])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RowLog(path, {"model": "other"}, overwrite=True) as log:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="make room"):
            log.append([{"row": 2}])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_link_stays(tmp_path: Path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "rows.jsonl")
    with RowLog(link, {}):
        pass
    assert link.is_symlink() and not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("output", [".", "-"])
def test_no_name_of_a_file(output: str, invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text(LINE)
    assert "The answers go to a file" in invoke("caption", tmp_path / "in.jsonl", "-o", output).error


def test_limits(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text(LINE)
    caption = ("caption", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-m", tiny_model_dir)
    assert "the model's window of" in invoke(*caption, "--max-new-tokens", 100_000).error
    outcome = invoke(*caption, "--batch-size", 10**30)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    "changed", [("--dtype", "bfloat16"), ("--backend", "torch"), ("--max-image-pixels", 5)], ids=lambda pair: pair[0]
)
def test_resume_refuses_what_changes_answers(
    changed: tuple[object, ...], invoke: Invoke, tiny_model_dir: Path, tmp_path: Path
):
    (tmp_path / "in.jsonl").write_text(LINE)
    caption = ("caption", tmp_path / "in.jsonl", "-o", tmp_path / "o.jsonl", "-m", tiny_model_dir)
    assert invoke(*caption, "--max-new-tokens", 4).code == 0
    assert "was begun with the" in invoke(*caption, "--max-new-tokens", 4, *changed).error
    assert json.loads((tmp_path / "o.jsonl.meta.json").read_text())["dtype"] == "auto"
