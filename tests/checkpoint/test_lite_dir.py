import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.lite_model import DATA_BYTES, FORM, fill, graph, outside, write_lite
from visualglm.checkpoint.lite_dir import (
    GRAPHS,
    LiteForm,
    LiteManifest,
    is_lite_directory,
    open_lite_directory,
    verify_lite,
    write_lite_directory,
)
from visualglm.checkpoint.model_dir import open_model_directory, verify
from visualglm.errors import CheckpointError, ConfigError
from visualglm.memory import estimate_lite_memory

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
FILES = [
    "WEIGHTS_LICENSE.txt",
    "config.json",
    "decoder.onnx",
    "decoder.onnx.data",
    "embed_tokens.onnx",
    "quantization.json",
    "tokenizer.model",
    "vision_encoder.onnx",
    "vision_encoder.onnx.data",
]


@pytest.fixture
def lite(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """An export to spoil."""
    return write_lite(tmp_path / "lite", tiny_model_dir).path


def edit(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def replace(path: Path, name: str, content: bytes) -> None:
    """Another content for a file, which the manifest knows of."""
    (path / name).write_bytes(content)
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit(path, files=files | {name: {"sha256": sha256(content).hexdigest(), "size": len(content)}})


def test_what_is_written_is_read(lite: Path, tiny_model_dir: Path, entries: Callable[[Path], list[str]]) -> None:
    opened, model = open_lite_directory(lite), open_model_directory(tiny_model_dir)
    manifest = opened.manifest
    assert entries(lite) == sorted([*FILES, "manifest.json"]) and sorted(manifest.files) == FILES
    assert LiteForm.model_validate(manifest.model_dump()) == FORM
    assert (manifest.format, manifest.format_version) == ("visualglm-onnx", 1)
    assert manifest.model_fingerprint == model.fingerprint
    assert manifest.tokenizer_sha256 == model.manifest.files["tokenizer.model"].sha256
    assert (manifest.parameter_count, manifest.source) == (model.manifest.parameter_count, model.manifest.source)
    assert opened.config == model.config
    assert opened.tokenizer_path == lite / "tokenizer.model"
    assert opened.weights_bytes == sum((lite / name).stat().st_size for name in FILES if ".onnx" in name)
    assert opened.memory == estimate_lite_memory(model.config, opened.weights_bytes, "int8")
    assert is_lite_directory(lite) and is_lite_directory(str(lite))
    assert verify_lite(lite) == manifest
    assert json.loads((lite / "manifest.json").read_text())["precision"] == "int4"


def test_the_graphs_run(lite: Path) -> None:
    for name in GRAPHS:
        session = onnxruntime.InferenceSession(open_lite_directory(lite).graph(name))
        np.testing.assert_array_equal(session.run(None, {"x": np.ones(32, np.float32)})[0], np.arange(32))


def test_without_a_kv_cache_and_without_a_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    tokenizer = (model / "tokenizer.model").read_bytes()
    (model / "tokenizer.model").unlink()
    files = json.loads((model / "manifest.json").read_text())["files"]
    del files["tokenizer.model"]
    edit(model, files=files)
    form = LiteForm(precision="fp32", kv_cache="float32", use_past=False)
    opened = write_lite(tmp_path / "lite", model, form)
    assert (opened.manifest.tokenizer_sha256, opened.tokenizer_path, opened.memory.kv_cache) == (None, None, 0)
    (opened.path / "tokenizer.model").write_bytes(tokenizer)
    assert open_lite_directory(opened.path).tokenizer_path == opened.path / "tokenizer.model"
    (opened.path / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is only a git-lfs pointer"):
        open_lite_directory(opened.path)


def test_neither_torch_nor_onnx_is_needed(lite: Path) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxruntime', 'mindspore')));"
        "from visualglm.checkpoint.lite_dir import open_lite_directory, verify_lite;"
        f"open_lite_directory({str(lite)!r}); verify_lite({str(lite)!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_another_kind_of_folder(lite: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"is a model directory, and an ONNX export is needed; give one made by `visualglm export`\.$",
    ):
        open_lite_directory(tiny_model_dir)
    for open_ in (open_model_directory, verify):
        with pytest.raises(
            CheckpointError,
            match=r"is an ONNX export, and a model directory is needed; give one made by `visualglm convert`\.$",
        ):
            open_(lite)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_lite_directory(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is a file; give the folder"):
        open_lite_directory(lite / "decoder.onnx")
    with pytest.raises(CheckpointError, match=r"holds the graphs of an export without its manifest\.json, and an ONNX"):
        open_lite_directory(Path(shutil.copytree(lite, tmp_path / "bare", ignore=lambda *_: ["manifest.json"])))
    assert not any(map(is_lite_directory, (tiny_model_dir, tmp_path, tmp_path / "nothing", lite / "decoder.onnx", "")))
    (tmp_path / "manifest.json").write_text("[]")
    assert not is_lite_directory(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": ["visualglm-onnx"]}')
    with pytest.raises(CheckpointError, match=r"has the format \['visualglm-onnx'\], which this program does not"):
        open_lite_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2, "files": "of another kind"}, "format version 2, .* reads up to 1; install a newer"),
        ({"precision": "int2"}, "is not valid: precision is 'int2', but must be 'fp32', .*; export the model again"),
        ({"kv_cache": "int4"}, "is not valid: kv_cache is 'int4', but must be 'float32'"),
        ({"use_past": None}, "is not valid: use_past"),
        ({"block_size": 0}, "is not valid: block_size is 0, but must be above 0"),
        ({"model_fingerprint": "x"}, "is not valid: model_fingerprint"),
        ({"tokenizer_sha256": 1}, "is not valid: tokenizer_sha256"),
        ({"files": {"../a": {"sha256": "0" * 64, "size": 1}}}, r"names a file outside its folder, \.\./a"),
        ({"files": {}}, r"does not list config\.json, vision_encoder\.onnx, embed_tokens\.onnx, decoder\.onnx"),
        ({"files": {"a": {"sha256": "0" * 64, "size": 1}}}, "lacks a; export the model again"),
    ],
)
def test_manifests_that_are_not_valid(changes: dict[str, Any], message: str, lite: Path) -> None:
    edit(lite, **changes)
    assert is_lite_directory(lite)
    with pytest.raises(CheckpointError, match=message):
        open_lite_directory(lite)


def test_later_versions_may_add_to_the_manifest(lite: Path) -> None:
    edit(lite, opset=23)
    assert open_lite_directory(lite).manifest.precision == "int4"


@pytest.mark.parametrize("name", ["config.json", "decoder.onnx", "decoder.onnx.data", "quantization.json"])
@pytest.mark.parametrize("open_", [open_lite_directory, verify_lite])
def test_spoiled_files(open_: Callable[[Path], object], name: str, lite: Path) -> None:
    path = lite / name
    content = path.read_bytes()
    path.write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is only a git-lfs pointer"):
        open_(lite)
    path.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=rf"{name} has [\d,]+ bytes instead of [\d,]+: .*; export the model again"
    ):
        open_(lite)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}; export the model again"):
        open_(lite)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit(name: str, lite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In large weights it is found by verifying, in all else that a model needs at once."""
    content = bytearray((lite / name).read_bytes())
    content[-1] ^= 1
    (lite / name).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"lite is damaged: {name} changed since it was written; export the model"
    ):
        verify_lite(lite)
    if name in ("config.json", "tokenizer.model") or ".onnx" in name:
        with pytest.raises(CheckpointError, match=f"{name} (changed since it was written|is not the tokenizer)"):
            open_lite_directory(lite)
    else:
        open_lite_directory(lite)
    if name.endswith(".data"):
        open_lite_directory(lite, hash_weights=False)
        # Those of both graphs count together.
        monkeypatch.setattr("visualglm.checkpoint.listed_files._SMALL_BYTES", 2 * DATA_BYTES - 1)
        open_lite_directory(lite)


def test_the_graph_of_another_part(lite: Path) -> None:
    shutil.copy(lite / "decoder.onnx", lite / "vision_encoder.onnx")
    with pytest.raises(CheckpointError, match=r"vision_encoder\.onnx has .* bytes instead of"):
        open_lite_directory(lite)
    replace(lite, "vision_encoder.onnx", (lite / "decoder.onnx").read_bytes())
    with pytest.raises(CheckpointError, match=r"vision_encoder\.onnx asks for weights in decoder\.onnx\.data, and may"):
        open_lite_directory(lite)


def test_another_tokenizer(lite: Path, builtin_model_dir: Path) -> None:
    """Also one that the manifest was made to list."""
    words = (
        r"tokenizer\.model is not the tokenizer that .*lite was exported with \(sha256 [0-9a-f]{64}\); put that one in"
    )
    other = (builtin_model_dir / "tokenizer.model").read_bytes()
    (lite / "tokenizer.model").write_bytes(other)
    with pytest.raises(CheckpointError, match=words):
        open_lite_directory(lite)
    replace(lite, "tokenizer.model", other)
    with pytest.raises(CheckpointError, match=words):
        open_lite_directory(lite)
    files = json.loads((lite / "manifest.json").read_text())["files"]
    del files["tokenizer.model"]
    edit(lite, files=files)
    (lite / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"lacks its tokenizer\.model; export the model again"):
        open_lite_directory(lite)


def test_a_configuration_that_is_not_valid(lite: Path) -> None:
    replace(lite, "config.json", b'{"dtype": "float8"}')
    with pytest.raises(ConfigError, match="dtype is 'float8'"):
        open_lite_directory(lite)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (graph(outside("../decoder.onnx.data", 0, 128)), r"asks for weights in \.\./decoder\.onnx\.data, and may only"),
        (graph(outside("decoder.onnx.data", 129, 128)), r"asks for weights beyond the end of decoder\.onnx\.data"),
        (graph(outside("decoder.onnx.data", 128, 128))[:-1], r"is no ONNX graph that can be used \(.*\); export the"),
        (bytes(64 * 2**20 + 1), "has 67,108,865 bytes, and may have 67,108,864, since weights lie outside; export the"),
    ],
    ids=range(4),
)
def test_hostile_graphs(content: bytes, message: str, lite: Path) -> None:
    """They are what the manifest says; nothing is left to the library that runs them."""
    replace(lite, "decoder.onnx", content)
    with pytest.raises(CheckpointError, match=rf"decoder\.onnx .*{message}"):
        open_lite_directory(lite)


def test_weights_in_a_file_that_is_not_listed(lite: Path) -> None:
    files = json.loads((lite / "manifest.json").read_text())["files"]
    del files["decoder.onnx.data"]
    edit(lite, files=files)
    with pytest.raises(CheckpointError, match=r"has its weights in decoder\.onnx\.data, which is not listed"):
        open_lite_directory(lite)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_to_files_are_followed(lite: Path, tmp_path: Path) -> None:
    """The caches of model hubs hold links to files that lie elsewhere, under other names."""
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(lite.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    opened = open_lite_directory(lite)
    assert verify_lite(lite) == opened.manifest
    onnxruntime.InferenceSession(opened.graph("decoder"))
    (tmp_path / "blobs" / "0").unlink()
    with pytest.raises(CheckpointError, match=r"lacks WEIGHTS_LICENSE\.txt"):
        open_lite_directory(lite)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")
@pytest.mark.parametrize("name", ["manifest.json", "decoder.onnx", "decoder.onnx.data", "tokenizer.model"])
def test_what_is_no_file_is_not_opened(name: str, lite: Path) -> None:
    (lite / name).unlink()
    os.mkfifo(lite / name)
    with pytest.raises(CheckpointError, match=f"lacks {name}|has no {name}"):
        open_lite_directory(lite)


def write(path: Path, model: Path, fill: Callable[[Path], LiteForm] = fill, **options: Any) -> LiteManifest:
    needed = options.pop("needed_bytes", 10_000)
    return write_lite_directory(path, open_model_directory(model), fill, needed_bytes=needed, **options).manifest


def test_only_an_export_that_nothing_lies_beside_is_replaced(lite: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not empty; give another folder, or --force"):
        write(lite, tiny_model_dir)
    (lite / "thesis.txt").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"holds thesis\.txt, which is no part of the ONNX export; it is not repl"
    ):
        write(lite, tiny_model_dir, force=True)
    (lite / "thesis.txt").unlink()
    (lite / "quantization.json").unlink()
    edit(lite, precision="fp32")
    assert write(lite, tiny_model_dir, force=True).precision == "int4"
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    with pytest.raises(
        CheckpointError, match=r"not replaced, because it is a model directory and not an ONNX export; give an"
    ):
        write(model, tiny_model_dir, force=True)
    verify(model)


@pytest.mark.parametrize("error", [CheckpointError("no"), OSError(28, "No space"), KeyboardInterrupt(), RuntimeError()])
def test_nothing_half_written_is_left(
    error: BaseException, lite: Path, tiny_model_dir: Path, entries: Callable[[Path], list[str]]
) -> None:
    def fail(folder: Path) -> LiteForm:
        fill(folder)
        assert not is_lite_directory(folder)
        raise error

    before = open_lite_directory(lite).manifest
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        write(lite, tiny_model_dir, fail, force=True)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        write(lite.with_name("new"), tiny_model_dir, fail)
    assert entries(lite.parent) == ["lite"] and verify_lite(lite) == before


def test_what_could_not_be_opened_does_not_appear(
    tiny_model_dir: Path, tmp_path: Path, entries: Callable[[Path], list[str]]
) -> None:
    def fill_wrongly(folder: Path) -> LiteForm:
        fill(folder)
        (folder / "decoder.onnx.data").unlink()
        return FORM

    with pytest.raises(CheckpointError, match=r"has its weights in decoder\.onnx\.data, which is not listed"):
        write(tmp_path / "lite", tiny_model_dir, fill_wrongly)
    with pytest.raises(CheckpointError, match=r"Writing needs .* GiB, but .* has .* free"):
        write(tmp_path / "lite", tiny_model_dir, needed_bytes=2**60)
    assert entries(tmp_path) == []


def test_progress_is_that_of_hashing(lite: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    size = sum((lite / name).stat().st_size for name in FILES)
    for hash_again in (
        lambda report: write(tmp_path / "new", tiny_model_dir, report=report),
        lambda report: verify_lite(lite, report),
    ):
        calls: list[tuple[int, int]] = []
        hash_again(lambda done, total, calls=calls: calls.append((done, total)))
        assert calls[-1] == (size, size) and len(calls) == len(FILES)
