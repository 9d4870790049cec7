"""Names of tensors in foreign checkpoints, and how these pack ChatGLM's q, k and v."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from visualglm.checkpoint.manifest import Layout
from visualglm.checkpoint.tensors import Tensor
from visualglm.config import TextConfig, VisualGLMConfig
from visualglm.parameters import parameter_shapes

_VIT = "mixins.eva.model.vit"
_QFORMER = "mixins.eva.model.qformer.transformer"

# Our names and those of SAT; `*` is the number of a layer, and a weight or bias may follow.
_SAT_NAMES = {
    "vision.patch_embed": f"{_VIT}.mixins.patch_embedding.proj",
    "vision.class_token": f"{_VIT}.transformer.word_embeddings.weight",
    "vision.position_embeddings": f"{_VIT}.transformer.position_embeddings.weight",
    "vision.layers.*.norm1": f"{_VIT}.transformer.layers.*.input_layernorm",
    "vision.layers.*.attention.qkv": f"{_VIT}.transformer.layers.*.attention.query_key_value",
    "vision.layers.*.attention.proj": f"{_VIT}.transformer.layers.*.attention.dense",
    "vision.layers.*.norm2": f"{_VIT}.transformer.layers.*.post_attention_layernorm",
    "vision.layers.*.mlp.fc1": f"{_VIT}.transformer.layers.*.mlp.dense_h_to_4h",
    "vision.layers.*.mlp.fc2": f"{_VIT}.transformer.layers.*.mlp.dense_4h_to_h",
    "vision.norm": f"{_VIT}.mixins.cls.ln_vision",
    "qformer.query_tokens": f"{_QFORMER}.word_embeddings.weight",
    "qformer.layers.*.input_norm": f"{_QFORMER}.layers.*.input_layernorm",
    "qformer.layers.*.attention.qkv": f"{_QFORMER}.layers.*.attention.query_key_value",
    "qformer.layers.*.attention.proj": f"{_QFORMER}.layers.*.attention.dense",
    "qformer.layers.*.attention_norm": f"{_QFORMER}.layers.*.post_attention_layernorm",
    "qformer.layers.*.cross_attention.q": f"{_QFORMER}.layers.*.cross_attention.query",
    "qformer.layers.*.cross_attention.kv": f"{_QFORMER}.layers.*.cross_attention.key_value",
    "qformer.layers.*.cross_attention.proj": f"{_QFORMER}.layers.*.cross_attention.dense",
    "qformer.layers.*.cross_attention_norm": f"{_QFORMER}.layers.*.post_cross_attention_layernorm",
    "qformer.layers.*.mlp.fc1": f"{_QFORMER}.layers.*.mlp.dense_h_to_4h",
    "qformer.layers.*.mlp.fc2": f"{_QFORMER}.layers.*.mlp.dense_4h_to_h",
    "qformer.norm": f"{_QFORMER}.final_layernorm",
    "projection": "mixins.eva.model.glm_proj",
    "text.word_embeddings": "transformer.word_embeddings",
    "text.layers.*.input_norm": "transformer.layers.*.input_layernorm",
    "text.layers.*.attention.qkv": "transformer.layers.*.attention.query_key_value",
    "text.layers.*.attention.proj": "transformer.layers.*.attention.dense",
    "text.layers.*.attention_norm": "transformer.layers.*.post_attention_layernorm",
    "text.layers.*.mlp.fc1": "transformer.layers.*.mlp.dense_h_to_4h",
    "text.layers.*.mlp.fc2": "transformer.layers.*.mlp.dense_4h_to_h",
    "text.norm": "transformer.final_layernorm",
    "text.lm_head": "mixins.chatglm-final.lm_head",
}
# Where HF names differ, they do by these beginnings.
_HF_PREFIXES = {"mixins.eva.model.": "image_encoder.", "mixins.chatglm-final.": ""}

# A leftover in the released SAT archive: nothing reads it.
STRAY_NAMES = ("transformer.position_embeddings.weight",)

_PACKED_TEXT = re.compile(r"text\.layers\.\d+\.attention\.qkv\.(weight|bias)")
_LAYER = re.compile(r"(?<=layers\.)\d+")
_PARAMETER = re.compile(r"\.(weight|bias)$")
_WEIGHT = ".weight"


def sat_name(name: str) -> str:
    """The name in a SAT archive of one of our parameters, or of one of our modules."""
    module = _PARAMETER.sub("", name)
    layer = _LAYER.search(module)
    found = _SAT_NAMES[_LAYER.sub("*", module)]
    return found.replace("*", layer[0] if layer else "") + name[len(module) :]


def hf_name(name: str) -> str:
    """The name in a Hugging Face checkpoint of one of our parameters."""
    found = sat_name(name)
    for sat, hf in _HF_PREFIXES.items():
        if found.startswith(sat):
            return hf + found.removeprefix(sat)
    return found


def hf_modules(config: VisualGLMConfig) -> dict[str, str]:
    """Our names of all modules with a matrix for a weight, by those in a Hugging Face checkpoint."""
    weights = [name for name, shape in parameter_shapes(config).items() if len(shape) == 2 and name.endswith(_WEIGHT)]
    return {hf_name(name).removesuffix(_WEIGHT): name.removesuffix(_WEIGHT) for name in weights}


@dataclass(frozen=True)
class KeyStyle:
    """How one format names our parameters, where it keeps the rotary frequencies, and whether it has a place for the
    stray tensor."""

    name: Callable[[str], str]
    rotary_names: Callable[[TextConfig], list[str]]
    keeps_stray: bool


SAT_KEYS = KeyStyle(sat_name, lambda _: ["mixins.chatglm-attn.rotary_emb.inv_freq"], keeps_stray=True)
HF_KEYS = KeyStyle(
    hf_name,
    lambda config: [
        f"transformer.layers.{layer}.attention.rotary_emb.inv_freq" for layer in range(config.num_hidden_layers)
    ],
    keeps_stray=False,
)


def unpacked(tensors: Mapping[str, Tensor], config: TextConfig, layout: Layout) -> dict[str, Tensor]:
    """Our parameters in thirds, given them as `layout` packs them."""
    heads = (config.num_attention_heads, 3, config.head_dim)
    return _regrouped(tensors, heads, layout)


def packed(tensors: Mapping[str, Tensor], config: TextConfig, layout: Layout) -> dict[str, Tensor]:
    """Our parameters as `layout` packs them, given them in thirds."""
    thirds = (3, config.num_attention_heads, config.head_dim)
    return _regrouped(tensors, thirds, layout)


def _regrouped(tensors: Mapping[str, Tensor], groups: tuple[int, int, int], layout: Layout) -> dict[str, Tensor]:
    if layout == "thirds":
        return dict(tensors)
    return {
        name: tensor.regrouped(groups, (1, 0, 2)) if _PACKED_TEXT.fullmatch(name) else tensor
        for name, tensor in tensors.items()
    }
