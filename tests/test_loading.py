"""`visualglm.load`: what it refuses, and in what words; and that importing the package costs nothing."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import visualglm
from visualglm import VisualGLMError
from visualglm.backends.mindspore import environment
from visualglm.checkpoint.lite_dir import open_lite_directory
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.errors import CheckpointError, DeviceError, TokenizerError
from visualglm.export.onnx import ExportOptions, export_onnx
from visualglm.export_cache import CACHE_VARIABLE
from visualglm.loading import BUILTIN_NAME, builtin_export, builtin_path, choose

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_python(code: str) -> str:
    """What a fresh interpreter prints; it must end well and say nothing on stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


def test_a_model_directory(tiny_model_dir: Path):
    for path in (tiny_model_dir, str(tiny_model_dir)):
        model = visualglm.load(path, device="cpu")
        assert isinstance(model, visualglm.VisualGLM)
        assert model.name == str(tiny_model_dir)
        assert model.backend.description == "onnx on cpu, fp32"


@pytest.mark.parametrize(
    ("options", "description"),
    [
        ({"backend": "torch", "device": "cpu"}, "torch on cpu, float32"),
        ({"backend": "torch", "device": "cpu", "dtype": "bfloat16"}, "torch on cpu, bfloat16"),
        ({"device": "cpu", "dtype": "bfloat16"}, "torch on cpu, bfloat16"),
        ({"backend": "onnx"}, "onnx on cpu, fp32"),
        ({"backend": "onnx", "dtype": "float16"}, "onnx on cpu, fp16"),
        ({"dtype": "int8"}, "onnx on cpu, int8"),
        ({"dtype": "int4"}, "onnx on cpu, int4"),
    ],
)
def test_what_runs_a_model_directory(options: dict[str, str], description: str, tiny_model_dir: Path):
    assert visualglm.load(tiny_model_dir, **options).backend.description == description


def test_without_a_path_the_builtin_model_is_loaded(builtin_model_dir: Path):
    assert builtin_model_dir == builtin_path()
    model = visualglm.load(device="cpu")
    assert (model.name, model.backend.description) == (BUILTIN_NAME, "onnx on cpu, fp32")


def test_the_builtin_export_is_one_of_the_builtin_model(builtin_model_dir: Path):
    export = open_lite_directory(builtin_export())
    assert export.manifest.model_fingerprint == open_model_directory(builtin_model_dir).fingerprint
    assert export.manifest.precision == "fp32"


def test_an_export_is_loaded_as_it_is(tiny_model_dir: Path, tmp_path: Path):
    export_onnx(open_model_directory(tiny_model_dir), tmp_path / "lite", ExportOptions("int4"))
    model = visualglm.load(tmp_path / "lite")
    assert (model.name, model.backend.description) == (str(tmp_path / "lite"), "onnx on cpu, int4")
    assert visualglm.load(tmp_path / "lite", dtype="int4", backend="onnx").name == model.name
    with pytest.raises(DeviceError, match="an export of precision int4 and cannot be run as int8"):
        visualglm.load(tmp_path / "lite", dtype="int8")
    with pytest.raises(DeviceError, match="which torch cannot run; give --backend onnx, or the model directory"):
        visualglm.load(tmp_path / "lite", backend="torch")


def test_a_model_is_exported_once(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    told: list[Path] = []

    @contextmanager
    def exporting(place: Path) -> Iterator[Callable[[int, int], None]]:
        told.append(place)
        yield lambda done, total: None

    options = {"backend": "auto", "device": "cpu", "dtype": "int8", "exporting": exporting}
    first = choose(tiny_model_dir, **options)
    assert told == [first.directory.path] and first.directory.path.parent == tmp_path / "cache"
    assert choose(tiny_model_dir, **options).directory == first.directory and len(told) == 1
    assert choose(tiny_model_dir, **options | {"dtype": "int4"}).directory != first.directory and len(told) == 2
    (first.directory.path / "decoder.onnx").write_bytes(b"damaged")
    assert choose(tiny_model_dir, **options).load().backend.description == "onnx on cpu, int8" and len(told) == 3


def test_processes_that_need_an_export_at_once_make_it_once(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    load = f"visualglm.load({str(tiny_model_dir)!r}, dtype='int8')"
    code = f"import visualglm\nprint({load}.ask(None, 'Hi', max_new_tokens=3))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    assert len({out for out, _ in ended}) == 1 and {err for _, err in ended} == {b""}
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_what_is_no_export_is_not_deleted_from_the_cache(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    place = choose(tiny_model_dir, backend="onnx", device="cpu", dtype="int8").directory.path
    (place / "manifest.json").unlink()
    (place / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"could not be exported on first use: .* is not replaced"):
        visualglm.load(tiny_model_dir, dtype="int8")
    assert (place / "mine.txt").read_text() == "mine"


def test_a_cache_that_cannot_be_written_is_told(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="set VISUALGLM_CACHE to a folder that can be written"):
        visualglm.load(tiny_model_dir, dtype="int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, r"The backend 'jax' is unknown; give auto, onnx, torch, mindspore or mindir\."),
        (
            {"device": "tpu", "backend": "torch"},
            r"The device 'tpu' is unknown; give auto, cpu, cuda, cuda:1, mps or npu",
        ),
        (
            {"device": "tpu", "backend": "onnx"},
            r"The device 'tpu' is unknown to the onnx backend; give auto, cpu, cuda",
        ),
        ({"dtype": "int3"}, r"The precision 'int3' is unknown; give auto, float32, bfloat16, float16, int8 or int4\."),
        ({"dtype": "int8", "backend": "torch"}, r"The torch backend has no int8; give --backend onnx, or another"),
        ({"dtype": "bfloat16", "backend": "onnx"}, r"The onnx backend has no bfloat16; give float32, float16, int8"),
        ({"dtype": "int4", "backend": "mindspore"}, r"The mindspore backend has no int4; give --backend onnx, or"),
        ({"graph_mode": 1}, r"The graph mode is MindSpore's, and the backend is auto; give --backend mindspore\."),
        ({"graph_mode": 2, "backend": "mindspore"}, r"The graph mode 2 is unknown; give 0 \(graph\) or 1"),
    ],
)
def test_options_that_nothing_can_serve(options: dict[str, Any], message: str, tiny_model_dir: Path):
    with pytest.raises(DeviceError, match=message):
        visualglm.load(tiny_model_dir, **options)


@pytest.mark.skipif(find_spec("mindspore") is not None, reason="for an environment without MindSpore")
def test_mindspore_that_is_missing(tiny_model_dir: Path):
    with pytest.raises(DeviceError, match=r"needs MindSpore 2\.10, which is not installed; run `pip install 'visualg"):
        visualglm.load(tiny_model_dir, backend="mindspore")


def test_numpy_that_is_too_new_for_mindspore(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: name)
    monkeypatch.setattr(environment, "version", lambda name: "2.4.6")
    with pytest.raises(DeviceError, match=r"MindSpore works with numpy below 2 and numpy 2\.4\.6 is installed; run"):
        visualglm.load(tiny_model_dir, backend="mindspore")


def test_what_is_no_model_directory(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        with pytest.raises(CheckpointError) as caught:
            visualglm.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_none(tiny_model_dir: Path):
    for path, words in ((5, "not int"), ("", "empty"), ("a" * 10_000, "File name too long"), ("a\0b", "null")):
        with pytest.raises(CheckpointError, match=words):
            visualglm.load(path)  # type: ignore[arg-type]
    assert visualglm.load(os.fsencode(tiny_model_dir), device="cpu").name == str(tiny_model_dir)  # type: ignore[arg-type]


def test_a_foreign_archive_is_told_to_be_converted():
    with pytest.raises(CheckpointError, match="visualglm convert"):
        visualglm.load(Path(__file__).parent / "goldens" / "c_text_only")


def test_a_tokenizer_of_another_model(tiny_model_dir: Path, tmp_path: Path):
    path = tmp_path / "model"
    path.mkdir()
    for file in tiny_model_dir.iterdir():
        content = file.read_bytes()
        if file.name == "config.json":
            content = content.replace(b'"bos_token_id": 8', b'"bos_token_id": 9')
        (path / file.name).write_bytes(content)
    with pytest.raises(TokenizerError, match="does not fit this model"):
        visualglm.load(path)


def test_importing_the_package_imports_nothing_heavy():
    heavy = run_python(
        "import sys, visualglm; print([n for n in ('torch', 'numpy', 'PIL', 'sentencepiece') if n in sys.modules])"
    )
    assert heavy == "[]"


FORBID = """
import importlib.util, sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

known = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {names!r} else known(name, package)
sys.meta_path.insert(0, Forbid())
import visualglm
"""
NO_TORCH = FORBID.format(names=("torch", "onnx"))
LOAD = """
try:
    print(visualglm.load({path!r}, backend={backend!r}).backend.description)
except visualglm.VisualGLMError as error:
    print(type(error).__name__, error)
"""


NEEDS_TORCH = "The torch backend needs PyTorch; run `pip install 'visualglm[torch]'`."
NEEDS_EXPORT = (
    "{path} has no export for ONNX Runtime yet; making one needs the package onnx; "
    "run `pip install 'visualglm[export]'`, or on another machine `visualglm export MODEL OUT`."
)


@pytest.mark.parametrize(
    ("missing", "backend", "said"),
    [
        (("torch", "onnx"), "torch", f"DeviceError {NEEDS_TORCH}"),
        (("torch", "onnx"), "auto", f"DeviceError {NEEDS_EXPORT}"),
        (("onnx",), "onnx", f"DeviceError {NEEDS_EXPORT[:-1]}; or give --backend torch, which is here."),
        (("onnx",), "auto", "torch on cpu, float32"),
        (("torch",), "auto", "onnx on cpu, fp32"),
    ],
)
def test_what_is_missing_is_done_without_or_told(
    missing: tuple[str, ...],
    backend: str,
    said: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    code = FORBID.format(names=missing) + LOAD.format(path=str(tiny_model_dir), backend=backend)
    assert run_python(code) == said.format(path=tiny_model_dir)


def test_the_builtin_model_answers_without_torch_and_onnx(builtin_model_dir: Path):
    ask = f"print(visualglm.load().ask({str(EXAMPLES / 'stop.png')!r}, 'What is written?'))"
    assert run_python(f"{NO_TORCH}\n{ask}") == "STOP"


def test_without_torch_everything_but_the_backend_can_be_imported():
    modules = "config errors memory model loading parameters backends.onnx.load processing.layout scenes.draw"
    names = [f"visualglm.{name}" for name in modules.split()]
    assert (
        run_python(f"{NO_TORCH}\nimport {', '.join(names)}\nprint('torch' in sys.modules, 'onnx' in sys.modules)")
        == "False False"
    )


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="module 'visualglm' has no attribute 'Visual'"):
        _ = visualglm.Visual
    assert issubclass(VisualGLMError, Exception)
