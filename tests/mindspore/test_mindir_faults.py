"""MindIR exports in odd places, and ones that cannot be made or run: each fault in a sentence, before it costs much."""

from pathlib import Path

import pytest

from visualglm.backends.mindir.load import load_mindir_backend
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.errors import DeviceError
from visualglm.export.mindir import MindirOptions, export_mindir


def test_folders_may_have_any_name(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MindSpore itself takes ASCII letters and digits alone."""
    folder = tmp_path / "sp äce 图片"
    folder.mkdir()
    monkeypatch.chdir(folder)
    done = export_mindir(open_model_directory(tiny_model_dir), "ö ut", MindirOptions(seq_length=16, use_past=False))
    assert Path.cwd() == folder and [path.name for path in folder.iterdir()] == ["ö ut"]
    assert load_mindir_backend(done).config.text.max_sequence_length == 16


@pytest.mark.parametrize("use_past", [True, False])
def test_shapes_that_no_memory_holds(use_past: bool, tiny_model_dir: Path, tmp_path: Path):
    options = MindirOptions(batch_size=10**9, use_past=use_past)
    message = (
        r"^1,000,000,000 rows of 192 tokens take [\d.]+ GiB of memory beside the model, and this machine has "
        r"[\d.]+ GiB left, which is enough for [\d,]+ rows; give a smaller --batch-size, or a smaller --seq-length\.$"
    )
    with pytest.raises(DeviceError, match=message):
        export_mindir(open_model_directory(tiny_model_dir), tmp_path / "out", options)
    assert not list(tmp_path.iterdir())
