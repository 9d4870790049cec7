from pathlib import Path
from typing import Any

import pytest

from visualglm.checkpoint.files import read_json_object
from visualglm.checkpoint.foreign_config import HF_CONFIG, SAT_CONFIG, config_from_foreign, config_to_foreign
from visualglm.config import TextConfig, VisualGLMConfig
from visualglm.errors import CheckpointError, ConfigError

STYLES = {"sat": SAT_CONFIG, "hf": HF_CONFIG}


@pytest.fixture
def sat_values(goldens: Path) -> dict[str, Any]:
    return read_json_object(goldens / "a_image_b1" / "model_config.json")


@pytest.fixture
def hf_values(goldens: Path) -> dict[str, Any]:
    return read_json_object(goldens / "a_hf_layout" / "config.json")


def read(values: dict[str, Any], style: str = "sat") -> VisualGLMConfig:
    return config_from_foreign(values, STYLES[style], "float16", "FILE")


def test_both_wrappings_of_one_model_say_the_same(sat_values: dict[str, Any], hf_values: dict[str, Any]) -> None:
    config = read(sat_values)
    assert config == read(hf_values, "hf")
    assert config.vision.model_dump() == {
        "image_size": 56,
        "patch_size": 14,
        "in_channels": 3,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "layer_norm_eps": 1e-6,
        "final_layer_norm_eps": 1e-5,
    }
    assert config.qformer.cross_attention_layers == (0, 2)
    assert config.text.eos_token_id == 509
    assert config.text.rotary_inv_freq_dtype == "float32"


def test_what_may_be_missing(sat_values: dict[str, Any]) -> None:
    config = read(sat_values)
    for name in ("inner_hidden_size", "pad_token_id", "image_length", "model_parallel_size"):
        del sat_values[name]
    del sat_values["qformer_args"]["is_decoder"]
    del sat_values["eva_args"]["layernorm_epsilon"]
    assert read(sat_values) == config
    sat_values["unknown"] = sat_values["eva_args"]["unknown"] = {"a": 1}
    assert read(sat_values) == config


@pytest.mark.parametrize(
    ("flags", "layers"), [(True, (0, 1, 2, 3)), (False, ()), ([False, True, False, False], (1,)), (None, (0, 2))]
)
def test_layers_with_cross_attention(flags: Any, layers: tuple[int, ...], sat_values: dict[str, Any]) -> None:
    sat_values["qformer_args"]["is_decoder"] = flags
    assert read(sat_values).qformer.cross_attention_layers == layers


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        (None, "layernorm_order", "pre", "layernorm_order is 'pre', and only 'post' is supported"),
        (None, "model_parallel_size", 2, "model_parallel_size is 2"),
        (None, "image_length", 8, "image_length is 8, and only 32"),
        ("eva_args", "pre_len", 0, "FILE, eva_args: pre_len is 0"),
        ("eva_args", "use_final_layernorm", True, "use_final_layernorm is True"),
        ("eva_args", "image_size", [56, 28], r"image size \[56, 28\]; only square"),
        ("qformer_args", "cross_attn_hidden_size", 16, "cross_attn_hidden_size is 16, and only 32"),
    ],
)
def test_models_that_compute_something_else(
    section: str | None, name: str, value: Any, message: str, sat_values: dict[str, Any]
) -> None:
    (sat_values[section] if section else sat_values)[name] = value
    with pytest.raises(CheckpointError, match=message):
        read(sat_values)


def test_missing_and_malformed_fields(sat_values: dict[str, Any]) -> None:
    without = {name: value for name, value in sat_values.items() if name not in ("num_layers", "vocab_size")}
    with pytest.raises(CheckpointError, match="FILE lacks num_layers, vocab_size"):
        read(without)
    with pytest.raises(CheckpointError, match="no section eva_args, so it is not of VisualGLM"):
        read({**sat_values, "eva_args": 3})
    for name, value in (("num_layers", "four"), ("hidden_size", None), ("bos_token_id", "x"), ("num_layers", -1)):
        with pytest.raises(ConfigError, match="FILE is not valid"):
            read({**sat_values, name: value})


@pytest.mark.parametrize("is_decoder", [True, None])
def test_numbers_of_layers_without_end(is_decoder: bool | None, sat_values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"text\.num_hidden_layers is 10000000, but must be at most 1,000\."):
        read({**sat_values, "num_layers": 10**7})
    qformer = sat_values["qformer_args"] | {"num_layers": 10**12, "is_decoder": is_decoder}
    with pytest.raises(ConfigError, match=r"qformer\.num_hidden_layers is 10+, but must be at most 1,000\."):
        read({**sat_values, "qformer_args": qformer})


@pytest.mark.parametrize("style", STYLES)
def test_a_new_file_says_the_same(style: str, sat_values: dict[str, Any]) -> None:
    for config in (read(sat_values), VisualGLMConfig()):
        assert read(config_to_foreign(config, STYLES[style], None), style) == config


@pytest.mark.parametrize("style", STYLES)
def test_new_files_have_the_fields_of_the_original_ones(
    style: str, sat_values: dict[str, Any], hf_values: dict[str, Any]
) -> None:
    new = config_to_foreign(read(sat_values), STYLES[style], None)
    original = {"sat": sat_values, "hf": hf_values | {"use_cache": True}}[style]
    for name, value in original.items():
        assert (new[name] | value if isinstance(value, dict) else value) == new[name]


def test_the_original_is_kept_while_it_is_true(sat_values: dict[str, Any]) -> None:
    sat_values["unknown"] = [1, 2]
    config = read(sat_values)
    assert config_to_foreign(config, SAT_CONFIG, sat_values) == sat_values
    longer = config.model_copy(update={"text": config.text.model_copy(update={"max_sequence_length": 999})})
    assert config_to_foreign(longer, SAT_CONFIG, sat_values)["max_sequence_length"] == 999
    rounded = config.model_copy(update={"text": config.text.model_copy(update={"rotary_inv_freq_dtype": "float16"})})
    assert config_to_foreign(rounded, SAT_CONFIG, sat_values) == sat_values


def test_what_a_format_cannot_express_is_named() -> None:
    config = VisualGLMConfig(text=TextConfig(rotary_base=20000.0, eos_token_id=5))
    with pytest.raises(CheckpointError, match=r"cannot express this model's text\.rotary_base, text\.eos_token_id"):
        config_to_foreign(config, SAT_CONFIG, None)
