"""`--config`: the YAML with which MindFormers answers, whose keys are options here or named as ignored."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.program import Invoke
from visualglm.cli.messages import Messages
from visualglm.cli.mindformers import with_config
from visualglm.cli.options import GenerationOptions, ModelOptions
from visualglm.errors import ConfigError

STOP = Path(__file__).parents[2] / "examples/stop.png"
YAML = """
seed: 42
run_mode: predict
context:
  mode: 1
  device_target: Ascend
  device_id: 3
  max_call_depth: 10000
runner_config:
  batch_size: &batch_size 1
model:
  model_config:
    type: VisualGLMConfig
    batch_size: *batch_size
    checkpoint_name_or_path: /path/to/visualglm_qformer.ckpt
    text_config:
      num_layers: 28
      use_past: True
      compute_dtype: float16
      max_decode_length: 2048
      top_k: 5
      top_p: 0.7
      repetition_penalty: 1.2
      do_sample: True
  arch:
    type: VisualGLMImageToTextGeneration
processor:
  tokenizer:
    vocab_file: /path/to/ice_text.model
"""


def _written(folder: Path, old: str = "", new: str = "") -> Path:
    path = folder / "predict.yaml"
    path.write_text(YAML.replace(old, new) if old else YAML, "utf-8")
    return path


def _both(
    path: Path, options: ModelOptions | None = None, generation: GenerationOptions | None = None
) -> tuple[ModelOptions, GenerationOptions]:
    given = replace(generation or GenerationOptions(), mindformers=path)
    return with_config(options or ModelOptions(quiet=True), given, Messages(True))


def test_keys_become_options(tmp_path: Path) -> None:
    options, generation = _both(_written(tmp_path), ModelOptions(backend="mindspore"))
    assert (generation.top_k, generation.top_p, generation.repetition_penalty, generation.seed) == (5, 0.7, 1.2, 42)
    assert (options.device, options.device_id, options.graph_mode) == ("ascend", 3, 1)
    assert options.runtime()["device"] == "ascend:3"


def test_the_command_line_comes_first(tmp_path: Path) -> None:
    given = ModelOptions(backend="mindspore", device="cpu", graph_mode=0)
    options, generation = _both(_written(tmp_path), given, GenerationOptions(top_k=2, seed=1))
    assert (generation.top_k, generation.top_p, generation.seed) == (2, 0.7, 1)
    assert (options.device, options.device_id, options.graph_mode) == ("cpu", None, 0)


def test_other_backends_take_nothing_of_the_device(tmp_path: Path) -> None:
    options, _ = _both(_written(tmp_path))
    assert options == ModelOptions(quiet=True)


def test_without_do_sample_answers_are_greedy(tmp_path: Path) -> None:
    _, generation = _both(_written(tmp_path, "do_sample: True", "do_sample: False"))
    assert (generation.top_k, generation.top_p) == (0, 1.0) and not generation.config().samples


def test_every_key_is_taken_or_named_with_a_reason(tmp_path: Path, invoke: Invoke) -> None:
    done = invoke("ask", "--image", str(STOP), "写了什么？", "--config", str(_written(tmp_path)))
    assert done.code == 0 and done.out.strip()
    notes = done.err
    assert "seed (--seed)" in notes and "model.model_config.text_config.top_k (--top-k)" in notes
    for key, why in {
        "context.{mode, device_target, device_id}": "--backend mindspore takes",
        "model.model_config.checkpoint_name_or_path": "the model directory that --model names",
        "model.model_config.text_config.max_decode_length": "--max-new-tokens",
        "run_mode": "answering has no use for it",
    }.items():
        [line] = [line for line in notes.splitlines() if key in line]
        assert why in line


def test_the_options_are_those_of_the_answer(tmp_path: Path, invoke: Invoke) -> None:
    ask = ("ask", "--image", str(STOP), "Describe this image.", "--quiet")
    by_file = invoke(*ask, "--config_path", str(_written(tmp_path)))
    by_options = invoke(*ask, "--top-k", "5", "--top-p", "0.7", "--repetition-penalty", "1.2", "--seed", "42")
    assert by_file.out == by_options.out != ""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("top_k: 5", "top_k: many", "text_config.top_k is 'many', which is no whole number; mend that."),
        ("top_p: 0.7", "top_p: [1]", "text_config.top_p is [1], which is no number; mend that."),
        ("mode: 1", "mode: 2", "context.mode is 2, which is no mode: 0 compiles graphs, 1 runs operators one by one"),
        ("Ascend", "[0]", "context.device_target is [0], which is no name of a device"),
        ("Ascend", "GPU", "context.device_target is 'GPU', and it can be Ascend or CPU here; mend that"),
        ("device_id: 3", "device_id: -1", "context.device_id is -1, and cards are counted from 0; mend that"),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _both(_written(tmp_path, old, new), ModelOptions(backend="mindspore"))
    assert told in str(caught.value)


def test_a_card_is_taken_for_an_export_as_mindir_too(tmp_path: Path) -> None:
    path = _written(tmp_path)
    options = _both(path, ModelOptions(backend="mindir", quiet=True))[0]
    assert (options.device, options.device_id, options.graph_mode) == ("ascend", 3, None)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/manifest.json").write_text('{"format": "visualglm-mindir"}', "utf-8")
    options = _both(path, ModelOptions(model=tmp_path / "export", quiet=True))[0]
    assert (options.device, options.device_id) == ("ascend", 3)


def test_a_device_is_named_in_letters_of_either_case() -> None:
    options = ModelOptions(backend="mindspore", device="Ascend", device_id=1)
    assert options.runtime()["device"] == "ascend:1"
    assert replace(options, device="auto").runtime()["device"] == "auto:1"


@pytest.mark.parametrize(("content", "told"), [(None, "cannot be read"), ("a: [", "is no valid YAML")])
def test_a_file_that_cannot_be_read_is_no_recipe(
    tmp_path: Path, invoke: Invoke, content: str | None, told: str
) -> None:
    path = tmp_path / "some.yaml"
    if content is not None:
        path.write_text(content, "utf-8")
    assert f"The file {path} {told}" in invoke("ask", "hello", "--config", path).error


def test_another_yaml_is_refused(tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("top_k: 5\n", "utf-8")
    done = invoke("ask", "hello", "--config", str(path))
    assert done.code == 1 and "is no YAML of MindFormers, which is what --config takes" in done.err
