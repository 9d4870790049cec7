"""Names and shapes of tensors in the three files of the MindFormers recipe: one table for both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from numpy.typing import NDArray

from visualglm.checkpoint.tensors import JoinedTensor, LazyTensor, Tensor
from visualglm.parameters import Shape

VIT, QFORMER, GLM, LITE = "visualglm_vit.ckpt", "visualglm_qformer.ckpt", "glm_6b.ckpt", "glm_6b_for_lite.ckpt"

_LAYER = re.compile(r"(?<=layers\.)\d+")
_PARAMETER = re.compile(r"\.(weight|bias)$")

Form = Literal["same", "batched", "transposed"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours is: in which file, and under which names, one for each equal part of its rows.

    batched: with a first axis of length 1. transposed: [in, out].
    """

    file: str
    names: tuple[str, ...]
    form: Form = "same"

    def shape(self, ours: Shape) -> Shape:
        """Of each tensor there, given that of ours."""
        if self.form == "transposed":
            return ours[::-1]
        return (1, *ours) if self.form == "batched" else (ours[0] // len(self.names), *ours[1:])

    def theirs(self, ours: Tensor) -> dict[str, Tensor]:
        """The tensors there, of ours."""
        if self.form == "same" and len(self.names) == 1:
            return {self.names[0]: ours}
        shape = self.shape(ours.shape)
        arrays = (partial(_part, ours, self.form, index, shape) for index in range(len(self.names)))
        return {name: LazyTensor(ours.dtype, shape, array) for name, array in zip(self.names, arrays, strict=True)}

    def ours(self, theirs: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """Our tensor of this shape, of those there by their names."""
        parts = tuple(theirs[name] for name in self.names)
        if self.form == "same":
            return parts[0] if len(parts) == 1 else JoinedTensor(parts, shape)
        return LazyTensor(parts[0].dtype, shape, partial(_part, parts[0], self.form, 0, shape))


def _part(tensor: Tensor, form: Form, index: int, shape: Shape) -> NDArray[Any]:
    array = tensor.array()
    if form == "transposed":
        return array.T
    if form == "batched":
        return array.reshape(shape)
    return array[index * shape[0] : (index + 1) * shape[0]]


@dataclass(frozen=True)
class _Module:
    """A module of theirs, or several that have a part of ours each; `kind` says what its parameters are called."""

    file: str
    names: tuple[str, ...]
    kind: Literal["linear", "transposed", "norm", "table", "batched"] = "linear"

    def place(self, parameter: str, layer: str) -> Place:
        """Of its `weight` or `bias`; the whole of what is called neither."""
        suffix = {
            "linear": f".{parameter}",
            "transposed": f".{parameter}",
            "norm": {"weight": ".gamma", "bias": ".beta"}.get(parameter, ""),
            "table": ".embedding_table",
            "batched": "",
        }[self.kind]
        form: Form = "batched" if self.kind == "batched" else "same"
        if self.kind == "transposed" and parameter == "weight":
            form = "transposed"
        return Place(self.file, tuple(name.replace("*", layer) + suffix for name in self.names), form)


def _vit(name: str, *parts: str) -> tuple[str, ...]:
    return tuple(f"visual_encoder.{name}{part}" for part in parts or ("",))


def _bert(name: str, *parts: str) -> tuple[str, ...]:
    return tuple(f"qformer.bert.encoder.{name}{part}" for part in parts or ("",))


# Our modules, `*` for the number of a layer.
_MODULES: Mapping[str, _Module] = {
    "vision.patch_embed": _Module(VIT, _vit("patch_embed.proj")),
    "vision.class_token": _Module(VIT, _vit("cls_tokens"), "batched"),
    "vision.position_embeddings": _Module(VIT, _vit("pos_embed"), "batched"),
    "vision.layers.*.norm1": _Module(VIT, _vit("blocks.*.layernorm1"), "norm"),
    "vision.layers.*.attention.qkv": _Module(VIT, _vit("blocks.*.attention.dense", "1", "2", "3")),
    "vision.layers.*.attention.proj": _Module(VIT, _vit("blocks.*.attention.projection"), "transposed"),
    "vision.layers.*.norm2": _Module(VIT, _vit("blocks.*.layernorm2"), "norm"),
    "vision.layers.*.mlp.fc1": _Module(VIT, _vit("blocks.*.output.mapping"), "transposed"),
    "vision.layers.*.mlp.fc2": _Module(VIT, _vit("blocks.*.output.projection"), "transposed"),
    "vision.norm": _Module(VIT, ("ln_vision",), "norm"),
    "qformer.query_tokens": _Module(QFORMER, ("query_tokens",), "batched"),
    "qformer.layers.*.input_norm": _Module(QFORMER, _bert("layer.*.input_layernorm"), "norm"),
    "qformer.layers.*.attention.qkv": _Module(QFORMER, _bert("layer.*.attention.self_att.", "query", "key", "value")),
    "qformer.layers.*.attention.proj": _Module(QFORMER, _bert("layer.*.attention.output.dense")),
    "qformer.layers.*.attention_norm": _Module(QFORMER, _bert("layer.*.attention.output.layernorm"), "norm"),
    "qformer.layers.*.cross_attention.q": _Module(QFORMER, _bert("layer.*.crossattention.self_att.query")),
    "qformer.layers.*.cross_attention.kv": _Module(QFORMER, _bert("layer.*.crossattention.self_att.", "key", "value")),
    "qformer.layers.*.cross_attention.proj": _Module(QFORMER, _bert("layer.*.crossattention.output.dense")),
    "qformer.layers.*.cross_attention_norm": _Module(QFORMER, _bert("layer.*.crossattention.output.layernorm"), "norm"),
    "qformer.layers.*.mlp.fc1": _Module(QFORMER, _bert("layer.*.intermediate_query.dense")),
    "qformer.layers.*.mlp.fc2": _Module(QFORMER, _bert("layer.*.output_query.dense")),
    "qformer.norm": _Module(QFORMER, _bert("final_layernorm"), "norm"),
    "projection": _Module(QFORMER, ("llm_proj",)),
    "text.word_embeddings": _Module(GLM, ("transformer.word_embeddings",), "table"),
    "text.layers.*.input_norm": _Module(GLM, ("transformer.layers.*.input_layernorm",), "norm"),
    "text.layers.*.attention.qkv": _Module(GLM, ("transformer.layers.*.attention.query_key_value",)),
    "text.layers.*.attention.proj": _Module(GLM, ("transformer.layers.*.attention.dense",)),
    "text.layers.*.attention_norm": _Module(GLM, ("transformer.layers.*.post_attention_layernorm",), "norm"),
    "text.layers.*.mlp.fc1": _Module(GLM, ("transformer.layers.*.mlp.dense_h_to_4h",)),
    "text.layers.*.mlp.fc2": _Module(GLM, ("transformer.layers.*.mlp.dense_4h_to_h",)),
    "text.norm": _Module(GLM, ("transformer.final_layernorm",), "norm"),
    "text.lm_head": _Module(GLM, ("lm_head",)),
}

# The file of the Q-Former has them again.
SHARED = ("vision.norm.weight", "vision.norm.bias")
# What there is instead of the stray tensor of the SAT archive.
STRAY = "transformer.position_embeddings.embedding_table"
# What `glm_6b_for_lite.ckpt` repeats of the language model.
LITE_NAMES = ("transformer.word_embeddings.embedding_table", STRAY)
ROTARY = re.compile(r"transformer\.layers\.\d{1,3}\.attention\.rotary_emb\.inv_freq")


def place(name: str) -> Place:
    """Where one of our parameters is."""
    parameter = _PARAMETER.search(name)
    module = name[: parameter.start()] if parameter else name
    layer = _LAYER.search(module)
    found = _MODULES[_LAYER.sub("*", module)]
    return found.place(parameter[1] if parameter else "", layer[0] if layer else "")


def places(names: Iterable[str]) -> Iterator[tuple[str, Place]]:
    """Each of our names with all its places, of which some have two."""
    for name in names:
        found = place(name)
        yield name, found
        if name in SHARED:
            yield name, Place(QFORMER, found.names, found.form)
