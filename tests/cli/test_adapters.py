"""Adapters on the command line: --adapter, merge, convert --base, export, check and info."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import visualglm
from tests.adapters import spoil_config, write_random_adapter
from tests.cli.program import Invoke, draw
from visualglm.checkpoint.adapter_dir import open_adapter
from visualglm.checkpoint.keys import hf_modules
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.loading import builtin_path

GOLDEN = Path(__file__).parents[1] / "goldens" / "a_image_b1"
SHORT = ("--max-new-tokens", "6")
QUESTION = "图里有什么？"


@pytest.fixture(scope="module")
def adapters(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three adapters of the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    write_random_adapter(folder / "rain", tiny_model_dir)
    write_random_adapter(folder / "snow", tiny_model_dir, seed=1, trained=("qformer.query_tokens",))
    write_random_adapter(folder / "wind", tiny_model_dir, seed=2, prefix_length=2)
    return folder


def answers_of(model: Path, adapter: Path | None, picture: Path, *questions: str) -> list[str]:
    loaded = visualglm.load(model, backend="torch", device="cpu", adapter=adapter)
    return [loaded.ask(picture, question, max_new_tokens=6) for question in questions]


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_ask_and_caption(
    backend: str, invoke: Invoke, tiny_model_dir: Path, adapters: Path, picture: Path, tmp_path: Path
):
    options = ("-m", tiny_model_dir, "--adapter", adapters / "snow", "--backend", backend, *SHORT)
    [expected] = answers_of(tiny_model_dir, adapters / "snow", picture, QUESTION)
    asked = invoke("ask", QUESTION, "-i", picture, *options, "--json")
    values = json.loads(asked.out)
    assert values["answer"] == expected
    assert values["model"] == f"{tiny_model_dir} with adapter {adapters / 'snow'}"
    out = tmp_path / "out.jsonl"
    caption = ("caption", picture.parent, "-o", out, "--prompt", QUESTION, *options)
    assert invoke(*caption).code == 0
    assert json.loads(out.read_text())["answer"] == expected
    # Answers of another adapter are not gone on with.
    caption = tuple(adapters / "rain" if each == adapters / "snow" else each for each in caption)
    assert "was made" in invoke(*caption).error or "other" in invoke(*caption).error


def test_chat_switches(invoke: Invoke, tiny_model_dir: Path, adapters: Path, picture: Path):
    rain, snow, wind = (adapters / name for name in ("rain", "snow", "wind"))
    chat = ("chat", "-m", tiny_model_dir, "-i", picture, *SHORT, "--adapter", rain, "--adapter", snow)
    lines = "one\n:adapter\n:clear\ntwo\n:adapter snow\n:clear\nthree\n:adapter storm\n:clear\nfour\n"
    outcome = invoke(*chat, "--adapter", f"storm={wind}", stdin=lines)
    assert outcome.code == 0, outcome
    expected = [
        *answers_of(tiny_model_dir, rain, picture, "one"),
        *answers_of(tiny_model_dir, None, picture, "two"),
        *answers_of(tiny_model_dir, snow, picture, "three"),
        *answers_of(tiny_model_dir, wind, picture, "four"),
    ]
    assert outcome.out.splitlines() == expected
    for note in (
        "Now with the adapter rain, of rain, snow, storm.",
        "Now with no adapter.",
        "Now with the adapter snow.",
        "Now with the adapter storm.",
    ):
        assert note in outcome.err
    outcome = invoke(*chat, stdin=":adapter fog\n")
    assert outcome.code == 1 and "There is no adapter 'fog': there are rain, snow; give one" in outcome.err


def test_what_chat_cannot_switch(invoke: Invoke, tiny_model_dir: Path, adapters: Path):
    chat = ("chat", "-m", tiny_model_dir, "--adapter", adapters / "rain")
    several = invoke(*chat, "--adapter", adapters / "snow", "--dtype", "int4")
    assert "onnx backend has int4, and cannot run several adapters, since one alone can" in several.error
    several = invoke(*chat, "--adapter", adapters / "snow", "--backend", "onnx")
    assert "onnx backend cannot run several adapters, since one alone can be merged into the weights" in several.error
    same = invoke(*chat, "--adapter", adapters / "rain")
    assert f"are both called rain; give one as NAME={adapters / 'rain'}" in same.error
    alone = invoke(*chat, "--backend", "onnx", *SHORT, stdin=":adapter\n")
    assert alone.code == 1 and "cannot switch adapters" in alone.err
    asked = invoke("ask", "x", "-m", tiny_model_dir, "--adapter", adapters / "rain", "--adapter", adapters / "snow")
    assert "2 adapters are given and one can be used; only chat switches between them" in asked.error


def test_wrong_models_and_folders(invoke: Invoke, tiny_model_dir: Path, adapters: Path, tmp_path: Path):
    ask = ("ask", "x", *SHORT)
    wrong = invoke(*ask, "--adapter", adapters / "rain")
    assert "belongs to the model tiny (fingerprint" in wrong.error
    assert "does not exist" in invoke(*ask, "--adapter", tmp_path / "no").error
    assert "is a model directory, and an adapter is needed" in invoke(*ask, "--adapter", tiny_model_dir).error
    assert "is an adapter" in invoke(*ask, "-m", adapters / "rain").error
    assert f"is no adapter: neither manifest.json nor adapter_config.json is there; give {adapters / 'rain'}." in (
        invoke(*ask, "--adapter", adapters).error
    )
    swapped = invoke("merge", adapters / "rain", tiny_model_dir, tmp_path / "out")
    assert "rain is an adapter, which comes second; give the model first." in swapped.error
    invoke("export", tiny_model_dir, tmp_path / "lite", "-q")
    lite = invoke(*ask, "-m", tmp_path / "lite", "--adapter", adapters / "rain")
    assert "is an export, which takes no adapter; give the model directory" in lite.error
    onnx = invoke(*ask, "-m", tiny_model_dir, "--adapter", adapters / "wind", "--backend", "onnx")
    assert "which has learned prefixes (P-tuning); give --backend torch" in onnx.error
    bench = invoke("bench", "--preset", "tiny", "--adapter", adapters / "rain")
    assert "An adapter belongs to a model, not to random weights" in bench.error


def test_merge(invoke: Invoke, tiny_model_dir: Path, adapters: Path, picture: Path, tmp_path: Path):
    out = tmp_path / "merged"
    outcome = invoke("merge", tiny_model_dir, adapters / "snow", out)
    assert outcome.code == 0 and outcome.err == ""
    assert "merged(x) = base(x) + Δ(x) in 3 layers, on random x; the largest deviation is " in outcome.out
    assert "LoRA     3 layers, rank 3, scale 2," in outcome.out
    assert answers_of(out, None, picture, "a", "b") == answers_of(tiny_model_dir, adapters / "snow", picture, "a", "b")
    told = f"merged       snow, fingerprint {open_adapter(adapters / 'snow').fingerprint}"
    assert told in invoke("info", out).out
    assert "is not empty" in invoke("merge", tiny_model_dir, adapters / "snow", out).error
    assert "belongs to the model tiny" in invoke("merge", out, adapters / "rain", tmp_path / "x").error
    assert "cannot be merged into weights" in invoke("merge", tiny_model_dir, adapters / "wind", tmp_path / "x").error
    stored = invoke("merge", tiny_model_dir, adapters / "snow", out, "--force", "--dtype", "stored")
    assert stored.code == 0
    assert {tensor.dtype for tensor in open_model_directory(out).tensors.values()} == {"float16"}
    assert not (tmp_path / "x").exists()


def test_export(invoke: Invoke, tiny_model_dir: Path, adapters: Path, picture: Path, tmp_path: Path):
    outcome = invoke("export", tiny_model_dir, tmp_path / "lite", "--adapter", adapters / "snow", "--precision", "fp32")
    assert outcome.code == 0 and f"with adapter {adapters / 'snow'}" in outcome.out
    assert "merged       snow, fingerprint " in invoke("info", tmp_path / "lite").out
    answer = visualglm.load(tmp_path / "lite").ask(picture, QUESTION, max_new_tokens=6)
    assert [answer] == answers_of(tiny_model_dir, adapters / "snow", picture, QUESTION)
    prefixed = invoke("export", tiny_model_dir, tmp_path / "x", "--adapter", adapters / "wind")
    assert "cannot be merged into weights" in prefixed.error


def test_convert(invoke: Invoke, tmp_path: Path):
    model, lora = tmp_path / "model", GOLDEN / "lora_only_state.pt"
    invoke("convert", GOLDEN, model, "-q")
    outcome = invoke("convert", lora, tmp_path / "known", "--base", model)
    assert outcome.code == 0 and outcome.err == "" and "LoRA     4 layers, rank 4 and 12, scale 0.25" in outcome.out
    outcome = invoke("convert", lora, tmp_path / "unknown")
    assert outcome.code == 0 and "Warning: without --base MODEL" in outcome.err
    assert open_adapter(tmp_path / "known").knows_base and not open_adapter(tmp_path / "unknown").knows_base
    outcome = invoke("merge", model, tmp_path / "unknown", tmp_path / "out")
    assert "Warning: The adapter" in outcome.err and "does not say which model it belongs to" in outcome.err
    assert "is what --base is for; leave it out" in invoke("convert", GOLDEN, tmp_path / "x", "--base", model).error
    other = invoke("convert", lora, tmp_path / "x", "--base", builtin_path())
    assert f"The adapter {tmp_path / 'x'} does not fit the model" in other.error
    assert "leave --to and --tokenizer out" in invoke("convert", lora, tmp_path / "x", "--to", "hf").error
    assert "is not empty" in invoke("convert", lora, tmp_path / "known").error
    assert invoke("convert", lora, tmp_path / "known", "--force", "-q").code == 0


def test_lora_of_the_hugging_face_model(invoke: Invoke, tiny_model_dir: Path, adapters: Path, tmp_path: Path):
    """The same numbers under the names of that model, whose q, k and v lie head by head, answer the same."""
    rain, theirs = open_adapter(adapters / "rain"), tmp_path / "peft"
    theirs.mkdir()
    assert rain.settings
    text = open_model_directory(tiny_model_dir).config.text
    names = {ours: name for name, ours in hf_modules(open_model_directory(tiny_model_dir).config).items()}
    tensors = {}
    for module, pair in rain.lora.items():
        b = pair.b.array()
        if module.endswith("qkv"):
            b = b.reshape(3, text.num_attention_heads, text.head_dim, -1).transpose(1, 0, 2, 3).reshape(b.shape)
        tensors |= {f"base_model.model.{names[module]}.lora_A.weight": pair.a.array().copy()}
        tensors |= {f"base_model.model.{names[module]}.lora_B.weight": b.copy()}
    save_file(tensors, theirs / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rain.settings.r, "lora_alpha": rain.settings.lora_alpha}
    told = {"base_model_name_or_path": "THUDM/visualglm-6b"}
    (theirs / "adapter_config.json").write_text(json.dumps(settings | told))
    error = invoke("ask", QUESTION, "-m", tiny_model_dir, "--adapter", theirs, *SHORT).error
    assert f"convert it with `visualglm convert {theirs} OUT --base MODEL`, and give OUT" in error
    outcome = invoke("convert", theirs, tmp_path / "ours", "--base", tiny_model_dir)
    assert outcome.out.startswith(f"source   {theirs}: fine-tuned by PEFT on the Hugging Face model\n")
    assert "Warning: PEFT noted THUDM/visualglm-6b as its model; that it fits MODEL is all" in outcome.err
    for module, pair in open_adapter(tmp_path / "ours").lora.items():
        assert np.array_equal(pair.b.array(), rain.lora[module].b.array()) and pair.scale == rain.lora[module].scale
    ask = ("ask", QUESTION, "-m", tiny_model_dir, "--backend", "torch", *SHORT, "--adapter")
    assert invoke(*ask, tmp_path / "ours").out == invoke(*ask, adapters / "rain").out
    assert "give that with --base MODEL" in invoke("convert", theirs, tmp_path / "blind").error
    file = theirs / "adapter_model.safetensors"
    error = invoke("convert", file, tmp_path / "blind", "--base", tiny_model_dir).error
    assert f"is a file; give the folder that it lies in, {theirs}." in error


def test_check_and_info(invoke: Invoke, adapters: Path, tmp_path: Path):
    outcome = invoke("check", adapters / "snow")
    assert outcome.code == 0 and "✗" not in outcome.out and "belongs" not in outcome.err
    assert "trained.safetensors" in outcome.out and "all are finite numbers" in outcome.out
    shutil.copytree(adapters / "snow", tmp_path / "spoilt")
    (tmp_path / "spoilt" / "trained.safetensors").write_bytes(b"")
    outcome = invoke("check", tmp_path / "spoilt")
    assert outcome.code == 1 and "✗  trained.safetensors" in outcome.out
    shutil.copytree(adapters / "rain", tmp_path / "odd")
    spoil_config(tmp_path / "odd", r=7)
    assert invoke("check", tmp_path / "odd").code == 1
    outcome = invoke("info", adapters / "wind")
    assert outcome.code == 0
    assert "prefixes     of 2 learned keys and values in every layer; torch only" in outcome.out
    assert "base         tiny, fingerprint " in outcome.out


def test_an_empty_name_or_path(invoke: Invoke, tiny_model_dir: Path, adapters: Path, tmp_path: Path):
    draw(tmp_path / "p.png", 1)
    for given in ("", "=", "a=", f"={tmp_path / 'nowhere'}", "\0", "x" * 5000):
        assert invoke("ask", "x", "-m", tiny_model_dir, "--adapter", given, *SHORT).error
