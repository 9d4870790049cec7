"""Configurations: the released sizes, and what is refused in what words."""

import json
from pathlib import Path
from typing import Any

import pytest

from visualglm.config import TextConfig, VisionConfig, VisualGLMConfig
from visualglm.errors import ConfigError
from visualglm.parameters import parameter_count, parameter_shapes

RELEASED_PARAMETERS = 7_802_193_408


def test_the_defaults_are_the_released_model():
    config = VisualGLMConfig()
    assert parameter_count(config) == RELEASED_PARAMETERS
    assert config.vision.sequence_length == 257
    assert config.text.head_dim == 128
    assert config.text.residual_scale == pytest.approx(56**0.5)


def test_parameters_of_the_released_model():
    shapes = parameter_shapes(VisualGLMConfig())
    assert shapes["vision.layers.38.attention.qkv.weight"] == (3 * 1408, 1408)
    assert shapes["qformer.layers.10.cross_attention.kv.weight"] == (2 * 768, 1408)
    assert "qformer.layers.11.cross_attention.kv.weight" not in shapes
    assert shapes["projection.weight"] == (4096, 768)
    assert shapes["text.lm_head.weight"] == shapes["text.word_embeddings.weight"] == (130528, 4096)
    assert next(iter(shapes)).startswith("vision.") and list(shapes)[-1] == "text.lm_head.weight"


def test_a_configuration_survives_its_file(tmp_path: Path, tiny_config: VisualGLMConfig):
    path = tmp_path / "config.json"
    path.write_text(tiny_config.model_dump_json(), "utf-8")
    assert VisualGLMConfig.from_file(path) == tiny_config


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        VisualGLMConfig().text.hidden_size = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1}, r"the key colour is unknown\.$"),
        ({"text": {"layers": 2}}, r"the key text\.layers is unknown\.$"),
        ({"text": {"hidden_size": 0}}, r"text\.hidden_size is 0, but must be at least 1\.$"),
        ({"text": {"hidden_size": "wide"}}, r"text\.hidden_size is 'wide', but must be a whole number\.$"),
        ({"dtype": "x" * 500}, r"dtype is 'x{79}, but must be 'float32'"),
        ({"text": 5}, r"text is 5, but must be a table of names and values\.$"),
        (
            {"text": {"hidden_size": 4095}},
            r"text\.hidden_size 4095 is not a multiple of text\.num_attention_heads 32\.$",
        ),
        (
            {"text": {"hidden_size": 12, "num_attention_heads": 2}},
            r"the width of a text attention head, 6, is not a multiple of 4, as its two rotary halves of pairs need\.$",
        ),
        ({"text": {"layer_norm_eps": float("inf")}}, r"text\.layer_norm_eps is inf, but must be a finite number"),
        ({"text": {"layer_norm_eps": float("nan")}}, r"text\.layer_norm_eps is nan, but must be a finite number"),
        ({"text": {"vocab_size": 512}}, r"text\.mask_token_id 130000 is not below text\.vocab_size 512\.$"),
        (
            {"text": {"rotary_inv_freq_dtype": "int8"}},
            r"text\.rotary_inv_freq_dtype is 'int8', but must be 'float32' or 'float16'",
        ),
        (
            {"text": {"max_sequence_length": 33}},
            r"qformer\.num_query_tokens 32 leaves no room for a question in text\.",
        ),
        ({"vision": {"image_size": 225}}, r"vision\.image_size 225 is not a multiple of vision\.patch_size 14\.$"),
        (
            {"vision": {"num_attention_heads": 5}},
            r"vision\.hidden_size 1408 is not a multiple of vision\.num_attention",
        ),
        ({"qformer": {"num_attention_heads": 5}}, r"qformer\.hidden_size 768 is not a multiple"),
        (
            {"qformer": {"cross_attention_layers": [0, 12]}},
            r"qformer\.cross_attention_layers names layer 12, but qformer\.num_hidden_layers is 12\.$",
        ),
        ({"text": {"num_hidden_layers": 10**7}}, r"text\.num_hidden_layers is 10000000, but must be at most 1,000\.$"),
        ({"vision": {"num_hidden_layers": 10**15}}, r"vision\.num_hidden_layers is 10+, but must be at most 1,000\.$"),
        ({"qformer": {"num_query_tokens": 5000}}, r"qformer\.num_query_tokens is 5000, but must be at most 4,096\.$"),
        ({"vision": {"image_size": 14_000}}, r"vision\.image_size is 14000, but must be at most 4,096\.$"),
        (
            {"text": {"max_sequence_length": 10**9}},
            r"text\.max_sequence_length is 10+, but must be at most 1,048,576\.$",
        ),
        ({"text": {"vocab_size": 10**8}}, r"text\.vocab_size is 10+, but must be at most 10,000,000\.$"),
        ({"text": {"hidden_size": 2**19}}, r"text\.hidden_size is 524288, but must be at most 262,144\.$"),
        ({"text": {"hidden_size": 10**5000}}, r"text\.hidden_size is a huge number, but must be "),
        ({"dtype": "float8"}, r"dtype is 'float8', but must be 'float32', 'float16' or 'bfloat16'\.$"),
    ],
)
def test_faults_are_told_in_one_sentence(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=r"^config\.json is not valid: " + message) as caught:
        VisualGLMConfig.from_dict(values, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"cannot be read as JSON .*; convert the checkpoint again\.$"),
        (b"\xff\xfe{}", r"cannot be read as JSON"),
        (b"[" * 100_000, r"cannot be read as JSON"),
        (b'{"dtype": "' + b"x" * 2**21 + b'"}', r"cannot be read as JSON \(Unterminated string"),
        (b"[1]", r"must hold one JSON object; convert the checkpoint again\.$"),
        (b'{"text": {"vocab_size": 512}}', r"is not valid: text\.mask_token_id"),
    ],
)
def test_faults_of_a_file_name_it(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        VisualGLMConfig.from_file(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"does not exist; give a model directory made by `visualglm convert`\.$"):
        VisualGLMConfig.from_file(tmp_path / "config.json")


def test_a_key_given_twice_in_a_row_counts_once():
    assert VisualGLMConfig.from_dict(json.loads('{"dtype": "float32", "dtype": "float16"}')).dtype == "float16"


def test_parts_by_themselves():
    assert VisionConfig(image_size=56).sequence_length == 17
    assert TextConfig(num_hidden_layers=2).residual_scale == 2.0
