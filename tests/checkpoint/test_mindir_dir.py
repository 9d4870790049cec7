"""MindIR directories of graphs that nothing can run: what is read, and what is refused, without MindSpore."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import visualglm
from visualglm.checkpoint.mindir_dir import (
    MindirForm,
    is_mindir_directory,
    open_mindir_directory,
    write_mindir_directory,
)
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.errors import CheckpointError, DeviceError
from visualglm.memory import estimate_lite_memory

FORM = MindirForm(precision="fp16", seq_length=64, batch_size=2, use_past=True, mindspore_version="2.10.0")
FULL, INC = "mindir_full_checkpoint_bs_2_64", "mindir_inc_checkpoint_bs_2_64"
FILES = [
    "WEIGHTS_LICENSE.txt",
    "config.json",
    f"{FULL}/rank_0_graph.mindir",
    f"{FULL}/rank_0_variables/data_0",
    f"{INC}/rank_0_graph.mindir",
    "mindir_vision_encoder/rank_0_graph.mindir",
    "tokenizer.model",
]


def write(path: Path, model_dir: Path, *, force: bool = False, form: MindirForm = FORM) -> Path:
    """The full graph has its weights beside it."""

    def fill(folder: Path) -> None:
        for graph in form.graphs:
            (folder / form.folder(graph)).mkdir()
            (folder / form.file(graph)).write_text(graph)
        variables = folder / form.folder("full") / "rank_0_variables"
        variables.mkdir()
        (variables / "data_0").write_bytes(bytes(100))

    model = open_model_directory(model_dir)
    return write_mindir_directory(path, model, form, fill, needed_bytes=10_000, force=force).path


@pytest.fixture
def mindir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """An export to spoil."""
    return write(tmp_path / "mindir", tiny_model_dir)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_written_is_read(mindir: Path, tiny_model_dir: Path):
    opened, model = open_mindir_directory(mindir), open_model_directory(tiny_model_dir)
    assert sorted(opened.manifest.files) == FILES
    assert MindirForm.model_validate(opened.manifest.model_dump()) == FORM
    assert opened.manifest.model_fingerprint == model.fingerprint
    assert opened.manifest.files[FILES[3]].sha256 == sha256(bytes(100)).hexdigest()
    assert opened.graph("inc") == mindir / INC / "rank_0_graph.mindir"
    assert opened.manifest.title == "fp16, 2 rows of 64 tokens, with a KV cache, made by MindSpore 2.10.0"
    assert opened.weights_bytes == len("fullincvision_encoder") + 100
    assert opened.memory == estimate_lite_memory(opened.config, opened.weights_bytes, "float16", batch_size=2)
    assert opened.model_config == model.config and opened.config.text.max_sequence_length == 64
    assert opened.context_path is None
    (mindir / "context.cfg").write_text("[ascend_context]\n")
    assert open_mindir_directory(mindir).context_path == mindir / "context.cfg"
    assert is_mindir_directory(mindir) and not is_mindir_directory(tiny_model_dir)


@pytest.mark.parametrize("name", FILES[:-1])
def test_whatever_is_damaged_missing_or_cut_short_is_named(name: str, mindir: Path):
    file = mindir / name
    content = file.read_bytes()
    file.write_bytes(b"x" * len(content))
    if name != FILES[0]:  # the licence is not computed with
        with pytest.raises(CheckpointError, match=rf"{name}.* changed since it was written; export the model again\.$"):
            open_mindir_directory(mindir)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{name} has .* it was cut short or changed; export the model again\.$"):
        open_mindir_directory(mindir)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {name}; export the model again\.$"):
        open_mindir_directory(mindir)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "a\\x", "a/./x", "C:/x"])
def test_files_outside_the_folder_are_refused(name: str, mindir: Path):
    (mindir.parent / "x").touch()
    record = {"sha256": "0" * 64, "size": 0}
    edit(mindir, lambda manifest: manifest["files"].update({name: record}))
    with pytest.raises(CheckpointError, match=r"names a file outside its folder"):
        open_mindir_directory(mindir)


def test_a_manifest_that_leaves_out_a_graph_or_is_newer(mindir: Path):
    edit(mindir, lambda manifest: manifest["files"].pop(f"{INC}/rank_0_graph.mindir"))
    with pytest.raises(CheckpointError, match=rf"does not list {INC}/rank_0_graph\.mindir; export the model again\.$"):
        open_mindir_directory(mindir)
    edit(mindir, lambda manifest: manifest.update(format_version=2))
    with pytest.raises(CheckpointError, match=r"has format version 2, and this program reads up to 1; install a newer"):
        open_mindir_directory(mindir)


def test_without_a_cache_there_is_no_incremental_graph(tiny_model_dir: Path, tmp_path: Path):
    form = FORM.model_copy(update={"use_past": False})
    opened = open_mindir_directory(write(tmp_path / "out", tiny_model_dir, form=form))
    assert not (opened.path / INC).exists() and opened.memory.kv_cache == 0 and "no KV cache" in opened.manifest.title


def test_only_such_exports_are_replaced(mindir: Path, tiny_model_dir: Path):
    with pytest.raises(CheckpointError, match=r"is not empty; give another folder, or --force to replace it\.$"):
        write(mindir, tiny_model_dir)
    assert write(mindir, tiny_model_dir, force=True) == mindir
    for foreign in (mindir / FULL / "notes.txt", mindir / "mine" / "notes.txt", mindir / "context.cfg"):
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_text("mine")
        with pytest.raises(
            CheckpointError, match=rf"holds {foreign.relative_to(mindir).parts[0]}, which is no part of"
        ):
            write(mindir, tiny_model_dir, force=True)
        foreign.unlink()
    (mindir / "mine").rmdir()
    shutil.copytree(tiny_model_dir, mindir.parent / "model")
    with pytest.raises(CheckpointError, match=r"is not replaced, because it is a model directory and not a MindIR exp"):
        write(mindir.parent / "model", tiny_model_dir, force=True)


def test_what_does_not_run_it(mindir: Path):
    for backend in ("onnx", "torch", "mindspore"):
        with pytest.raises(
            DeviceError, match=rf"export for MindSpore, which {backend} cannot run; give --backend mind"
        ):
            visualglm.load(mindir, backend=backend)
    with pytest.raises(DeviceError, match=r"is an export, which takes no adapter; give the model directory"):
        visualglm.load(mindir, adapter=mindir)
    with pytest.raises(DeviceError, match=r"of precision fp16 and cannot be run as float32; leave --dtype out"):
        visualglm.load(mindir, dtype="float32")
    with pytest.raises(
        DeviceError, match=r"^An export as MindIR needs MindSpore 2\.10, which is not installed; run `pi"
    ):
        visualglm.load(mindir)
    with pytest.raises(
        DeviceError, match=r"^The mindir backend runs exports only, and the built-in model is none; make"
    ):
        visualglm.load(backend="mindir")
    with pytest.raises(
        CheckpointError, match=r"is a MindIR export, and a model directory is needed; give one made by `"
    ):
        open_model_directory(mindir)


def test_links_to_files_are_followed_and_lead_no_weights_away(mindir: Path):
    """MindSpore would look for the weights where the link of their graph leads."""
    elsewhere = mindir.parent / "elsewhere"
    elsewhere.mkdir()
    for name in (f"{INC}/rank_0_graph.mindir", "config.json", f"{FULL}/rank_0_variables/data_0"):
        moved = (mindir / name).rename(elsewhere / Path(name).name)
        (mindir / name).symlink_to(moved)
        if "data" not in name:
            open_mindir_directory(mindir)
    with pytest.raises(
        CheckpointError, match=r"data_0 does not lie beside rank_0_graph\.mindir where links are follow"
    ):
        open_mindir_directory(mindir)


def test_a_model_is_not_exported_into_itself(tiny_model_dir: Path, tmp_path: Path):
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for output in (model / "sub", model / "a" / ".." / "sub"):
        with pytest.raises(
            CheckpointError, match=r"sub lies in the model that is to be exported, .*; give another fold"
        ):
            write(output, model)
    assert not (model / "sub").exists()
    assert write(tmp_path / "model-mindir", model).is_dir()
