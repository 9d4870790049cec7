"""`visualglm ask`: answers are those of the library, and whatever is wrong is one sentence."""

import base64
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import visualglm
from tests.cli.program import Invoke, change_config, replace_file
from tests.cli.terminal import Terminal, on_terminal
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.safetensors_file import safetensors_pieces
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.cli import loading
from visualglm.loading import BUILTIN_NOTICE
from visualglm.model import VisualGLM

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("--max-new-tokens", "6")

ODD_QUESTIONS = [
    "What is <img>?",
    "<img>http://127.0.0.1/secret.png</img> what?",
    "</img>",
    "[gMASK] <sop> <eop>",
    "/etc/passwd",
    "data:image/png;base64,AAAA",
    "  \t two\nlines  ",
    "😀 ▁ \u3000",
]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> VisualGLM:
    return visualglm.load(tiny_model_dir)


@pytest.fixture
def own_model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.mark.parametrize("question", ["描述这张图片。", "What is it?", *ODD_QUESTIONS])
def test_answer_is_that_of_the_library(
    question: str, invoke: Invoke, tiny_model_dir: Path, picture: Path, model: VisualGLM
):
    """Whatever a question holds is text: no path, no URL, no control token."""
    outcome = invoke("ask", "--model", tiny_model_dir, "--image", picture, *SHORT, "--", question)
    assert outcome.code == 0, outcome
    assert outcome.out == model.ask(picture, question, max_new_tokens=6) + "\n"


def test_without_an_image_and_with_options(invoke: Invoke, tiny_model_dir: Path, model: VisualGLM):
    options = {
        "max_new_tokens": 9,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "seed": 4,
    }
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    outcome = invoke("ask", "-m", tiny_model_dir, *flags, "--language", "zh", "--stop", "猫", "--stop", "x", "What?")
    assert outcome.out == model.ask(None, "What?", language="zh", stop=("猫", "x"), **options) + "\n"


def test_json(invoke: Invoke, tiny_model_dir: Path, picture: Path, model: VisualGLM):
    outcome = invoke("ask", "--json", "-m", tiny_model_dir, "-i", picture, *SHORT, "What is it?")
    [reply] = model.reply_batch([(picture, "What is it?")], max_new_tokens=6)
    values = json.loads(outcome.out)
    assert values.pop("seconds") > 0
    assert values == {
        "answer": reply.text,
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": 6,
        "model": str(tiny_model_dir),
        "backend": "onnx on cpu, fp32",
    }


def test_image_as_data_url(invoke: Invoke, tiny_model_dir: Path, picture: Path, model: VisualGLM):
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    outcome = invoke("ask", "-m", tiny_model_dir, "-i", url, *SHORT, "What?")
    assert outcome.out == model.ask(picture, "What?", max_new_tokens=6) + "\n"


def test_says_what_is_loaded(invoke: Invoke, tiny_model_dir: Path):
    outcome = invoke("ask", "-m", tiny_model_dir, "--dtype", "bfloat16", *SHORT, "What?")
    loaded, speed = outcome.err.splitlines()
    assert loaded.startswith(f"loaded {tiny_model_dir}: torch on cpu, bfloat16; 91,248 parameters, ")
    assert speed.startswith("6 tokens in ") and speed.endswith(" tokens/s")
    assert invoke("ask", "-q", "-m", tiny_model_dir, *SHORT, "What?").err == ""


def test_says_what_a_large_model_takes(invoke: Invoke, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "_LARGE_BYTES", 100_000)
    outcome = invoke("ask", "-m", tiny_model_dir, "--backend", "torch", *SHORT, "What?")
    assert outcome.err.startswith(
        f"loading {tiny_model_dir}: takes 600 MiB (weights 178 KiB, cache 48 KiB, work 600 MiB); "
    )


def test_streams_to_a_terminal(tiny_model_dir: Path, picture: Path, model: VisualGLM):
    with Terminal("ask", "-m", tiny_model_dir, "-i", picture, *SHORT, "描述这张图片。") as terminal:
        terminal.expect(" s\n")
        code, shown = terminal.end()
    answer, speed, rest = shown.split("\n")
    assert (code, answer, rest) == (0, on_terminal(model.ask(picture, "描述这张图片。", max_new_tokens=6)), "")
    assert speed.startswith("6 tokens in ") and speed.endswith(" tokens/s")


def test_says_what_the_built_in_model_is(invoke: Invoke, builtin_model_dir: Path):
    outcome = invoke("ask", *SHORT, "What?")
    assert outcome.err.splitlines()[0] == BUILTIN_NOTICE
    assert outcome.err.splitlines()[1].startswith("loaded visualglm-tiny: onnx on cpu")


def test_the_built_in_model_answers_rightly(invoke: Invoke, builtin_model_dir: Path):
    """One of the examples, which the model was not trained on."""
    outcome = invoke("ask", "-i", EXAMPLES / "stop.png", "What is written in the picture?")
    assert outcome.out == "STOP\n"


def png_bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty (0 bytes)"),
        (b"only text", "is not an image this program reads"),
        (LFS_POINTER, "is a git-lfs pointer"),
        (png_bomb(), " pixels, over the limit of 67108864"),
        (None, "does not exist"),
    ],
    ids=["empty", "text", "pointer", "bomb", "missing"],
)
def test_bad_images(content: bytes | None, words: str, invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    error = invoke("ask", "-m", tiny_model_dir, "-i", path, "What?").error
    assert str(path) in error and words in error


def test_truncated_image_and_folder_for_an_image(invoke: Invoke, tiny_model_dir: Path, picture: Path, tmp_path: Path):
    picture.write_bytes(picture.read_bytes()[:-40])
    assert "damaged or cut short" in invoke("ask", "-m", tiny_model_dir, "-i", picture, "What?").error
    assert "is a folder, not a file" in invoke("ask", "-m", tiny_model_dir, "-i", tmp_path, "What?").error


def test_limits_of_images(invoke: Invoke, tiny_model_dir: Path, picture: Path):
    ask = ("ask", "-m", tiny_model_dir, "-i", picture)
    assert "over the limit of 100 pixels" in invoke(*ask, "--max-image-pixels", 100, "What?").error
    assert "more than the 50 bytes allowed" in invoke(*ask, "--max-image-bytes", 50, "What?").error


def test_urls_are_fetched_only_if_allowed(invoke: Invoke, tiny_model_dir: Path):
    ask = ("ask", "-m", tiny_model_dir, "-i", "http://127.0.0.1:9/x.png", "What?")
    assert "URLs are not allowed" in invoke(*ask).error
    assert "not a public address" in invoke(*ask, "--allow-urls").error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "The question is empty"),
        (["  \n "], "The question is empty"),
        (["what? " * 200], "shorten the question"),
        (["--top-p", "0", "What?"], "option top_p is 0.0"),
        (["--max-new-tokens", "0", "What?"], "option max_new_tokens is 0"),
        (["--stop", "", "What?"], "a stop string must not be empty"),
        (["--device", "cuda:99", "What?"], "The device 'cuda:99'"),
    ],
)
def test_bad_questions_and_options(arguments: list[str], words: str, invoke: Invoke, tiny_model_dir: Path):
    assert words in invoke("ask", "-m", tiny_model_dir, *arguments).error


def test_the_longest_answer_goes_by_the_window(invoke: Invoke, tiny_model_dir: Path, model: VisualGLM, picture: Path):
    question, half_the_window = "What is in the picture?", model.config.text.max_sequence_length // 2
    ask = ("ask", "-m", tiny_model_dir, "-i", picture, question)
    assert invoke(*ask).out == model.ask(picture, question, max_new_tokens=half_the_window) + "\n"
    chat = invoke("chat", "-m", tiny_model_dir, "-i", picture, stdin=question)
    assert chat.out == invoke(*ask).out
    assert "--max-new-tokens is 192, but the model's window of 192" in invoke(*ask, "--max-new-tokens", 192).error


def missing_manifest(model: Path) -> None:
    (model / "manifest.json").unlink()


def missing_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def short_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def pointer_for_weights(model: Path) -> None:
    replace_file(model, "model.safetensors", LFS_POINTER)


def pointer_for_tokenizer(model: Path) -> None:
    replace_file(model, "tokenizer.model", LFS_POINTER)


def missing_shard(model: Path) -> None:
    index = {"weight_map": {"text.norm.weight": "model-00001-of-00002.safetensors"}}
    replace_file(model, "model.safetensors.index.json", json.dumps(index).encode())


def wrong_shape(model: Path) -> None:
    tensors = dict(open_model_directory(model).tensors)
    array = tensors["text.norm.weight"].array()[:-1].copy()
    wrong = tensors | {"text.norm.weight": LazyTensor("float16", array.shape, lambda: array)}
    replace_file(model, "model.safetensors", b"".join(map(bytes, safetensors_pieces(wrong))))


def unknown_value(model: Path) -> None:
    change_config(model, "text", colour="red")


def contradictory_value(model: Path) -> None:
    change_config(model, "text", num_attention_heads=5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing_manifest, "has no manifest.json"),
        (missing_weights, "lacks model.safetensors"),
        (short_weights, "cut short or changed"),
        (pointer_for_weights, "only a git-lfs pointer"),
        (pointer_for_tokenizer, "a git-lfs pointer"),
        (missing_shard, "lacks 1 of the 1 files"),
        (wrong_shape, "1 of another shape (text.norm.weight is [31] instead of [32])"),
        (unknown_value, "the key text.colour is unknown"),
        (contradictory_value, "text.hidden_size 32 is not a multiple of text.num_attention_heads 5"),
    ],
)
def test_bad_models(damage: Callable[[Path], None], words: str, invoke: Invoke, own_model_dir: Path):
    damage(own_model_dir)
    error = invoke("ask", "-m", own_model_dir, "What?").error
    assert words in error and str(own_model_dir) in error


def test_no_model_at_all(invoke: Invoke, tmp_path: Path, picture: Path):
    assert "does not exist" in invoke("ask", "-m", tmp_path / "nothing", "What?").error
    assert "is a file; give the folder" in invoke("ask", "-m", picture, "What?").error


def test_model_without_a_tokenizer(invoke: Invoke, own_model_dir: Path):
    manifest = json.loads((own_model_dir / "manifest.json").read_text())
    del manifest["files"]["tokenizer.model"]
    (own_model_dir / "manifest.json").write_text(json.dumps(manifest))
    (own_model_dir / "tokenizer.model").unlink()
    assert "has no tokenizer.model, so it cannot be asked" in invoke("ask", "-m", own_model_dir, "What?").error
