"""The configuration files of SAT and Hugging Face checkpoints: the same fields, in two wrappings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visualglm.config import MAX_LAYERS, VisualGLMConfig
from visualglm.errors import CheckpointError
from visualglm.faults import brief

Values = Mapping[str, Any]

# Our names of fields and theirs.
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "inner_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "layer_norm_eps": "layernorm_epsilon",
}
_VISION = _SIZES | {"patch_size": "patch_size", "in_channels": "in_channels"}
_QFORMER = _SIZES | {"num_query_tokens": "vocab_size"}
_TOKENS = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
_TEXT = _SIZES | {name: name for name in ("vocab_size", "max_sequence_length", *_TOKENS)}
_REQUIRED = ("hidden_size", "num_layers", "num_attention_heads", "vocab_size")

# Fields that can have but one value: with another, the original code would compute something else.
_VISION_FIXED = {
    "vocab_size": 1,
    "layernorm_order": "pre",
    "model_parallel_size": 1,
    "use_final_layernorm": False,
    "pre_len": 1,
    "post_len": 0,
    "num_classes": 0,
}
_QFORMER_FIXED = {"layernorm_order": "post", "model_parallel_size": 1, "max_sequence_length": 0}


@dataclass(frozen=True)
class ConfigStyle:
    """How one format wraps the fields: its sections, what is fixed beside them, and what is only a label."""

    file_name: str
    vision_section: str
    qformer_section: str
    fixed: Values
    labels: Values
    has_eos: bool


SAT_CONFIG = ConfigStyle(
    file_name="model_config.json",
    vision_section="eva_args",
    qformer_section="qformer_args",
    fixed={"layernorm_order": "post", "model_parallel_size": 1},
    labels={"model_class": "VisualGLMModel"},
    has_eos=False,
)
HF_CONFIG = ConfigStyle(
    file_name="config.json",
    vision_section="eva_config",
    qformer_section="qformer_config",
    fixed={"position_encoding_2d": True},
    labels={"model_type": "chatglm", "use_cache": True},
    has_eos=True,
)


def config_from_foreign(values: Values, style: ConfigStyle, dtype: str, where: str) -> VisualGLMConfig:
    """Our configuration of a foreign one; fields we do not know are left alone. `where` names it in errors.

    Raises `CheckpointError` if fields are missing or ask for another model, `ConfigError` if values are not valid.
    """
    vision = _section(values, style.vision_section, where)
    qformer = _section(values, style.qformer_section, where)
    text = _fields(values, _TEXT, where)
    if not style.has_eos and isinstance(values.get("bos_token_id"), int):
        text["eos_token_id"] = values["bos_token_id"] + 1
    config = {
        "vision": _fields(vision, _VISION, where) | _image_size(vision, where),
        "qformer": _fields(qformer, _QFORMER, where) | _cross_attention(qformer),
        "text": text,
        "dtype": dtype,
    }
    check_fixed(values, {**style.fixed, "image_length": qformer["vocab_size"]}, where)
    check_fixed(vision, _VISION_FIXED, f"{where}, {style.vision_section}")
    fixed = {**_QFORMER_FIXED, "cross_attn_hidden_size": vision["hidden_size"]}
    check_fixed(qformer, fixed, f"{where}, {style.qformer_section}")
    return VisualGLMConfig.from_dict(config, where)


def config_to_foreign(config: VisualGLMConfig, style: ConfigStyle, original: Values | None) -> dict[str, Any]:
    """The foreign configuration of ours: `original` where that still says the same, else a new one.

    Raises `CheckpointError` if the format cannot express it.
    """
    if original is not None and not _differences(config, original, style):
        return dict(original)
    values = _new_foreign(config, style)
    lost = _differences(config, values, style)
    if lost:
        raise CheckpointError(f"A {style.file_name} cannot express this model's {', '.join(lost)}.")
    return values


def _new_foreign(config: VisualGLMConfig, style: ConfigStyle) -> dict[str, Any]:
    vision, qformer, text = (
        {theirs: getattr(section, ours) for ours, theirs in table.items()}
        for section, table in ((config.vision, _VISION), (config.qformer, _QFORMER), (config.text, _TEXT))
    )
    if not style.has_eos:
        del text["eos_token_id"]
    vision |= _VISION_FIXED | {
        "image_size": [config.vision.image_size] * 2,
        "max_sequence_length": config.vision.sequence_length,
    }
    cross = config.qformer.cross_attention_layers
    qformer |= _QFORMER_FIXED | {
        "cross_attn_hidden_size": config.vision.hidden_size,
        "is_decoder": [layer in cross for layer in range(config.qformer.num_hidden_layers)],
    }
    return {
        **style.labels,
        **style.fixed,
        **text,
        "image_length": config.qformer.num_query_tokens,
        style.vision_section: vision,
        style.qformer_section: qformer,
    }


def _differences(config: VisualGLMConfig, values: Values, style: ConfigStyle) -> list[str]:
    """The fields in which `values` say something else than `config`."""
    said = config_from_foreign(values, style, config.dtype, style.file_name)
    return [
        f"{part}.{name}"
        for part in ("vision", "qformer", "text")
        for name, value in getattr(config, part)
        # How exact the rotary tables are is our choice; the formats have no field for it.
        if name != "rotary_inv_freq_dtype" and value != getattr(getattr(said, part), name)
    ]


def _section(values: Values, name: str, where: str) -> Values:
    section = values.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{where} has no section {name}, so it is not of VisualGLM; give a VisualGLM checkpoint.")
    return section


def _fields(section: Values, table: Mapping[str, str], where: str) -> dict[str, Any]:
    missing = [name for name in _REQUIRED if name not in section]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}; get the file again.")
    found = {ours: section[theirs] for ours, theirs in table.items() if theirs in section}
    if found.get("intermediate_size") is None and isinstance(found["hidden_size"], int):
        found["intermediate_size"] = 4 * found["hidden_size"]
    return found


def _image_size(vision: Values, where: str) -> dict[str, Any]:
    size = vision.get("image_size")
    if size is None:
        return {}
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            raise CheckpointError(f"{where} has the image size {brief(size)}; only square images are supported.")
        size = size[0]
    return {"image_size": size}


def _cross_attention(qformer: Values) -> dict[str, Any]:
    """`is_decoder`, one flag or one for each layer, says where cross-attention is: else in every even layer."""
    count = qformer["num_layers"]
    # A number that is refused later; nothing is made of it here.
    layers = range(count if isinstance(count, int) and count <= MAX_LAYERS else 0)
    flags = qformer.get("is_decoder")
    if isinstance(flags, bool):
        flags = [flags] * len(layers)
    elif not isinstance(flags, list):
        flags = [layer % 2 == 0 for layer in layers]
    return {"cross_attention_layers": [layer for layer, flag in enumerate(flags) if flag]}


def check_fixed(section: Values, fixed: Values, where: str) -> None:
    for name, value in fixed.items():
        if name in section and section[name] != value:
            raise CheckpointError(f"{where}: {name} is {brief(section[name])}, and only {value!r} is supported.")
