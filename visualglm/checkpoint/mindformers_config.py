"""The configuration of a model in the files of MindFormers: from a file beside them, and from shapes of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from visualglm.checkpoint.foreign_config import check_fixed
from visualglm.checkpoint.mindformers_keys import place
from visualglm.config import MAX_LAYERS, VisualGLMConfig
from visualglm.errors import CheckpointError
from visualglm.parameters import Shape

OWN_CONFIG = "visualglm_config.json"
"""What we write beside the files: they and their recipe do not tell all."""
RECIPES = "run_visualglm*.yaml"

Sections = dict[str, dict[str, Any]]

_TOKENS = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
# Our names of fields and theirs, by the sections of a recipe's model_config.
_FIELDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "vision": (
        "vision_config",
        {
            "image_size": "image_size",
            "patch_size": "patch_size",
            "in_channels": "num_channels",
            "hidden_size": "hidden_size",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "intermediate_size": "intermediate_size",
            "layer_norm_eps": "layer_norm_eps",
        },
    ),
    "qformer": (
        "qformer_config",
        {
            "num_query_tokens": "query_length",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_heads",
            "layer_norm_eps": "layer_norm_eps",
        },
    ),
    "text": (
        "text_config",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "intermediate_size": "inner_hidden_size",
            "layer_norm_eps": "layernorm_epsilon",
            **{name: name for name in _TOKENS},
        },
    ),
}
_FIXED: Mapping[str, Mapping[str, object]] = {
    "vision_config": {"post_layernorm_residual": False},
    "text_config": {"layernorm_order": "post", "position_encoding_2d": True, "use_final_layernorm": True},
}


def mindformers_config(path: Path, shapes: Mapping[str, Shape], head_dim: int | None) -> VisualGLMConfig:
    """The configuration of the model in folder `path`, whose tensors have these shapes.

    head_dim: of the language model, where rotary frequencies tell it. Raises `CheckpointError` if nothing there tells
    it all, `ConfigError` if a file that should does not.
    """
    if (path / OWN_CONFIG).exists():
        config = VisualGLMConfig.from_file(path / OWN_CONFIG)
        _require_sizes(path, config, _sizes(path, shapes))
        return config
    sizes = _sizes(path, shapes)
    if head_dim and sizes["text"]["hidden_size"] % head_dim == 0:
        sizes["text"]["num_attention_heads"] = sizes["text"]["hidden_size"] // head_dim
    recipe = recipe_beside(path)
    for part, (section, names) in _FIELDS.items():
        said = {ours: recipe.get(section, {}).get(theirs) for ours, theirs in names.items()}
        sizes[part] |= {name: value for name, value in said.items() if value is not None}
        check_fixed(recipe.get(section, {}), _FIXED.get(section, {}), f"The recipe in {path}, {section}")
        _add_heads(path, part, sizes[part])
    return VisualGLMConfig.from_dict(sizes, f"What {path} and its recipe tell of the model")


def _require_sizes(path: Path, config: VisualGLMConfig, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    told = config.model_dump(mode="json")
    for part, found in sizes.items():
        for name, size in found.items():
            if told[part][name] != size:
                raise CheckpointError(
                    f"{path / OWN_CONFIG} tells of another model than the tensors beside it: its {part}.{name} is "
                    f"{told[part][name]}, and they have {size}; put the file that was written with them there."
                )


def recipe_beside(folder: Path) -> Sections:
    """The sections of model_config in the recipes in a folder; none without a recipe.

    Raises `ConfigError` if one cannot be read, `CheckpointError` if two tell of different models.
    """
    found: dict[Path, Sections] = {}
    for file in sorted(folder.glob(RECIPES)):
        sections = _sections(file)
        if sections:
            found[file] = sections
    told = {file: _told(sections) for file, sections in found.items()}
    differing = [file.name for file in told if told[file] != next(iter(told.values()))]
    if differing:
        raise CheckpointError(
            f"{next(iter(told))} and {differing[0]} tell of different models; leave the one that is of these weights."
        )
    # Of those that tell the same, the one for LoRA tells more.
    with_lora = [sections for sections in found.values() if "pet_config" in sections.get("text_config", {})]
    return next(iter([*with_lora, *found.values()]), {})


def _sections(file: Path) -> Sections:
    try:
        from visualglm.yaml_file import read_yaml
    except ModuleNotFoundError as error:
        raise CheckpointError(f"Reading {file} needs PyYAML; `pip install pyyaml` adds it.") from error
    values: Any = read_yaml(file)
    for key in ("model", "model_config"):
        values = values.get(key)
        if not isinstance(values, dict):
            return {}
    return {name: section for name, section in values.items() if isinstance(section, dict)}


def _told(sections: Sections) -> list[Any]:
    """All that is read of the sections here, but for LoRA."""
    return [sections.get(section, {}).get(theirs) for section, names in _FIELDS.values() for theirs in names.values()]


def _add_heads(path: Path, part: str, sizes: dict[str, Any]) -> None:
    released = getattr(VisualGLMConfig(), part)
    if "num_attention_heads" not in sizes:
        if sizes["hidden_size"] != released.hidden_size:
            raise CheckpointError(
                f"Nothing in {path} tells how many attention heads the {part} part has, and tensors alone do not; put "
                f"the recipe that the model was made with ({RECIPES}) there."
            )
        sizes["num_attention_heads"] = released.num_attention_heads


def _sizes(path: Path, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Any]]:
    """What shapes tell, by our names of parts and fields."""

    def shape(name: str, rank: int) -> Shape:
        theirs = place(name).names[0]
        found = shapes.get(theirs)
        if found is None or len(found) != rank:
            what = "lacks" if found is None else f"has {list(found)} as the shape of"
            raise CheckpointError(f"{path} {what} {theirs}, so it is not of VisualGLM; get it again.")
        return found

    def layers(name: str) -> list[int]:
        return [layer for layer in range(MAX_LAYERS + 1) if place(name.format(layer)).names[0] in shapes]

    width, channels, patch, _ = shape("vision.patch_embed.weight", 4)
    _, positions, _ = shape("vision.position_embeddings", 3)
    _, queries, qformer_width = shape("qformer.query_tokens", 3)
    vocabulary, text_width = shape("text.word_embeddings.weight", 2)
    return {
        "vision": {
            "image_size": isqrt(max(0, positions - 1)) * patch,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": width,
            "intermediate_size": shape("vision.layers.0.mlp.fc1.bias", 1)[0],
            "num_hidden_layers": len(layers("vision.layers.{}.norm1.weight")),
        },
        "qformer": {
            "num_query_tokens": queries,
            "hidden_size": qformer_width,
            "intermediate_size": shape("qformer.layers.0.mlp.fc1.bias", 1)[0],
            "num_hidden_layers": len(layers("qformer.layers.{}.input_norm.weight")),
            "cross_attention_layers": layers("qformer.layers.{}.cross_attention.q.weight"),
        },
        "text": {
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": shape("text.layers.0.mlp.fc1.bias", 1)[0],
            "num_hidden_layers": len(layers("text.layers.{}.input_norm.weight")),
        },
    }
