"""What --force may delete."""

from functools import partial
from pathlib import Path

import pytest

from visualglm.checkpoint.adapter_dir import AdapterManifest
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.manifest import Manifest
from visualglm.checkpoint.replaceable import require_replaceable, require_replaceable_as
from visualglm.errors import CheckpointError


def test_checkpoints_of_every_format_are_replaced(sat_archive: Path, hf_folder: Path, model_dir: Path) -> None:
    for folder in (sat_archive, hf_folder, model_dir):
        require_replaceable(folder)


def test_a_file_of_the_user_is_kept(sat_archive: Path, hf_folder: Path, model_dir: Path) -> None:
    for place in (sat_archive, sat_archive / "1", hf_folder, model_dir):
        letter = place / "thesis.txt"
        letter.write_text("x")
        with pytest.raises(CheckpointError, match=r"holds (thesis\.txt|1), which is no part .* it is not replaced\."):
            require_replaceable(sat_archive if place.name == "1" else place)
        letter.unlink()
        (place / "photos").mkdir()
        with pytest.raises(CheckpointError, match="it is not replaced"):
            require_replaceable(sat_archive if place.name == "1" else place)
        (place / "photos").rmdir()


def test_a_folder_in_the_place_of_a_file_is_kept(model_dir: Path) -> None:
    (model_dir / "tokenizer.model").mkdir()
    with pytest.raises(CheckpointError, match=r"holds tokenizer\.model"):
        require_replaceable(model_dir)


def test_a_folder_of_another_kind_is_kept(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "visualglm-onnx"}')
    for check in (require_replaceable, partial(require_replaceable_as, Manifest)):
        with pytest.raises(CheckpointError) as raised:
            check(tmp_path)
        assert str(raised.value) == (
            f"{tmp_path} is not replaced, because it is an ONNX export and not a model directory; "
            "give another folder, or remove this one first."
        )
    with pytest.raises(CheckpointError, match="not replaced, because it is a model directory and not an adapter"):
        require_replaceable_as(AdapterManifest, model_dir)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "{}", "thesis.txt": "x"},
        {"config.json": "{}", "model.safetensors": "x"},
        {"config.json": '{"eva_config": {}, "qformer_config": {}}'},
        {"config.json": "no JSON"},
        {"manifest.json": '{"name": "an app"}'},
        {"model_config.json": "{}"},
    ],
)
def test_other_folders_are_kept(files: dict[str, str], model_dir: Path, tmp_path: Path) -> None:
    web = tmp_path / "web"
    web.mkdir()
    for name, content in files.items():
        (web / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"web is not replaced, because it is no whole checkpoint: .*\.$"):
        convert(model_dir, web, force=True)
    assert {path.name: path.read_text() for path in web.iterdir()} == files
