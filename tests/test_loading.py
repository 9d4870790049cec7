"""`visualglm.load`: what it refuses, and in what words; and that importing the package costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import visualglm
from visualglm import VisualGLMError
from visualglm.errors import CheckpointError, DeviceError, TokenizerError
from visualglm.loading import BUILTIN_NAME, builtin_path


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
        assert model.backend.description == "torch on cpu, float32"
    assert visualglm.load(tiny_model_dir, backend="torch", device="cpu", dtype="bfloat16").backend.description == (
        "torch on cpu, bfloat16"
    )


def test_without_a_path_the_builtin_model_is_loaded(builtin_model_dir: Path):
    assert builtin_model_dir == builtin_path()
    assert visualglm.load(device="cpu").name == BUILTIN_NAME


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, r"The backend 'jax' is unknown; give auto or torch\."),
        ({"device": "tpu"}, r"The device 'tpu' is unknown; give auto, cpu, cuda, cuda:1, mps or npu\."),
        ({"dtype": "int3"}, r"The precision 'int3' is unknown; give auto, float32, float16, bfloat16\."),
    ],
)
def test_unknown_options(options: dict[str, str], message: str, tiny_model_dir: Path):
    with pytest.raises(DeviceError, match=message):
        visualglm.load(tiny_model_dir, **options)


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


NO_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name="torch")

sys.meta_path.insert(0, NoTorch())
"""


def test_without_torch_there_is_a_sentence_and_no_traceback(tiny_model_dir: Path):
    said = run_python(
        f"{NO_TORCH}\nimport visualglm\ntry:\n    visualglm.load({str(tiny_model_dir)!r})\n"
        "except visualglm.VisualGLMError as error:\n    print(type(error).__name__, error)"
    )
    assert said == "DeviceError The torch backend needs PyTorch; run `pip install 'visualglm[torch]'`."


def test_without_torch_everything_but_the_backend_can_be_imported():
    modules = "config, errors, memory, model, loading, parameters, processing.layout, generation.decoding, scenes.draw"
    names = [f"visualglm.{name}" for name in modules.split(", ")]
    assert run_python(f"{NO_TORCH}\nimport {', '.join(names)}\nprint('torch' in sys.modules)") == "False"


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="module 'visualglm' has no attribute 'Visual'"):
        _ = visualglm.Visual
    assert issubclass(VisualGLMError, Exception)
