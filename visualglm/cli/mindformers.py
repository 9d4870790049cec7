"""Options for answering from the YAML of MindFormers: `--config run_visualglm_6b_image_to_text_generation.yaml`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from visualglm.checkpoint.mindir_dir import is_mindir_directory
from visualglm.cli.messages import Messages
from visualglm.cli.options import GenerationOptions, ModelOptions
from visualglm.errors import ConfigError
from visualglm.faults import brief
from visualglm.mindformers_yaml import Translation, flat_keys, is_mindformers, reason_for

T = TypeVar("T", ModelOptions, GenerationOptions)

_TEXT = "model.model_config.text_config."
_SAMPLING = {f"{_TEXT}{name}": name for name in ("top_k", "top_p")}
_ANSWERS = {f"{_TEXT}repetition_penalty": "repetition_penalty", "seed": "seed"}
_DO_SAMPLE = f"{_TEXT}do_sample"
_DEVICE_ID = "context.device_id"
_DEVICE = {"context.device_target": "device", _DEVICE_ID: "device_id"}
_MODE = {"context.mode": "graph_mode"}
_TARGETS = ("ascend", "cpu")
_KINDS: dict[str, tuple[type | UnionType, str]] = {
    "device": (str, "name of a device"),
    "graph_mode": (int, "mode: 0 compiles graphs, 1 runs operators one by one"),
    "top_p": (int | float, "number"),
    "repetition_penalty": (int | float, "number"),
}

_GREEDY = "do_sample is false, and answers are the likeliest"
_GRAPHS = "an export as MindIR is graphs already"
_GIVEN = "the command line says otherwise"
# Why a key is ignored; the first pattern that fits.
_REASONS = {
    " ".join(_MODE | _DEVICE): "it is about MindSpore, which --backend mindspore takes",
    "load_checkpoint *checkpoint_name_or_path *vocab_file": (
        "weights and tokenizer come from the model directory that --model names"
    ),
    "*max_decode_length": "an answer is as long as --max-new-tokens lets it be",
    "*use_past": "there is a KV cache always",
    "*dtype *layernorm_compute_type *softmax_compute_type *param_init_type": "--dtype is for the whole model",
    "model.* processor.*": "sizes and shapes are those of the model directory",
    "runner_config.* *batch_size": "--batch-size of caption and evaluate says how many rows are answered at once",
    "eval_dataset* eval_callbacks* metric.*": "evaluate is given its rows as an argument",
    "context.*": "memory and graphs are the backend's matter",
    "*": "answering has no use for it",
}


def with_config(
    options: ModelOptions, generation: GenerationOptions, messages: Messages
) -> tuple[ModelOptions, GenerationOptions]:
    """Both with what the file of `--config` says, where the command line says nothing; and tells what became of it.

    Raises `ConfigError` if the file is not one of MindFormers, or a value is not of the kind that its key takes.
    """
    if generation.mindformers is None:
        return options, generation
    keys, done = flat_keys(_read(generation.mindformers)), Translation()
    samples = keys.get(_DO_SAMPLE, True)
    answers = _ANSWERS | (_SAMPLING if samples else {})
    generation = _taken(generation, answers, keys, done)
    is_mindir = _is_mindir(options)
    if is_mindir or options.backend == "mindspore":
        if options.device != "auto" and keys.get(_DEVICE_ID) is not None:
            # The number is that of the file's device.
            done.ignored[_DEVICE_ID] = _GIVEN
            del keys[_DEVICE_ID]
        options = _taken(options, _DEVICE if is_mindir else _MODE | _DEVICE, keys, done)
    if _DO_SAMPLE in keys:
        done.taken[_DO_SAMPLE] = "--top-k, --top-p"
    reasons = ({} if samples else {" ".join(_SAMPLING): _GREEDY}) | ({" ".join(_MODE): _GRAPHS} if is_mindir else {})
    reasons |= _REASONS
    for key in keys:
        if key not in done.taken:
            done.ignored.setdefault(key, reason_for(key, reasons))
    for note in done.notes():
        messages.tell(note)
    return options, generation


def _is_mindir(options: ModelOptions) -> bool:
    """Whether an export for MindSpore is to be run, which by itself says so."""
    found = options.model is not None and is_mindir_directory(options.model)
    return options.backend == "mindir" or (options.backend == "auto" and found)


def _read(path: Path) -> dict[str, Any]:
    try:
        from visualglm.yaml_file import read_yaml
    except ModuleNotFoundError as error:
        raise ConfigError(f"Reading {path} needs PyYAML; `pip install pyyaml` adds it.") from error
    values = read_yaml(path, "The file")
    if not is_mindformers(values):
        raise ConfigError(
            f"{path} is no YAML of MindFormers, which is what --config takes; give everything else as options."
        )
    return values


def _taken(options: T, names: dict[str, str], keys: dict[str, Any], done: Translation) -> T:
    """`options` with those of `keys` that `names` knows; one that was given on the command line stays."""
    found: dict[str, Any] = {}
    unset = {field.name: field.default for field in fields(options)}
    for key, name in names.items():
        if keys.get(key) is None:
            continue
        if getattr(options, name) != unset[name]:
            done.ignored[key] = _GIVEN
            continue
        found[name] = _checked(key, name, keys[key])
        done.taken[key] = f"--{name.replace('_', '-')}"
    return replace(options, **found)


def _checked(key: str, name: str, value: object) -> object:
    kind, what = _KINDS.get(name, (int, "whole number"))
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or (name == "graph_mode" and value not in (0, 1)):
        raise ConfigError(f"{key} is {brief(value)}, which is no {what}; mend that.")
    if name == "device" and str(value).lower() not in _TARGETS:
        raise ConfigError(f"{key} is {brief(value)}, and it can be Ascend or CPU here; mend that, or give --device.")
    if name == "device_id" and isinstance(value, int) and value < 0:
        raise ConfigError(f"{key} is {value}, and cards are counted from 0; mend that, or give --device-id.")
    return value.lower() if isinstance(value, str) else value
