"""Whether the graphs of a lite directory are those that its manifest and its configuration tell of."""

from __future__ import annotations

from visualglm.checkpoint.files import readable
from visualglm.checkpoint.lite_dir import GRAPHS, Graph, LiteDirectory
from visualglm.checkpoint.manifest import MANIFEST
from visualglm.checkpoint.onnx_graph import Signature, Value, Weights, read_signature, read_weights
from visualglm.errors import CheckpointError
from visualglm.parameters import parameter_count

_CACHED = "past_key_values.0.key"
# A parameter that every export keeps in the type that the decoder computes in.
_TYPICAL = "text.norm.weight"
_FLOATS = {"float32": "fp32", "float16": "fp16"}


def require_as_told(directory: LiteDirectory) -> None:
    """Raises `CheckpointError` unless the graphs are as the manifest tells, and take and give what the model's do.

    They are looked at, not run; the message names the field of the manifest, or the input or output.
    """
    found = {name: read_signature(directory.graph(name), directory.read_graph(name)) for name in GRAPHS}
    wanted = _wanted(directory)
    for name in ("vision_encoder", "embed_tokens"):
        _require_signature(directory, name, found[name], wanted[name])
    weights = read_weights(directory.graph("decoder"), directory.read_graph("decoder"))
    for field, value in _told_by_decoder(directory, found["decoder"], weights).items():
        _require_field(directory, field, value, "decoder.onnx")
    _require_signature(directory, "decoder", found["decoder"], wanted["decoder"])
    _require_field(directory, "parameter_count", parameter_count(directory.config), "the model of config.json")


def _told_by_decoder(directory: LiteDirectory, signature: Signature, weights: Weights) -> dict[str, object]:
    """What the fields of the manifest should be, as far as the decoder shows it."""
    told, sizes = directory.manifest, {size for _, size in weights.blocks}
    fields: dict[str, object] = {"use_past": _CACHED in signature.inputs}
    if told.use_past and fields["use_past"]:
        fields["kv_cache"] = signature.inputs[_CACHED].element
    if weights.blocks:
        # Some layers of an int4 export may have 8 bits.
        fields["precision"] = f"int{min(bits for bits, _ in weights.blocks)}"
        fields["block_size"] = told.block_size if told.block_size in sizes else min(sizes)
    else:
        fields["precision"] = _FLOATS.get(weights.constants.get(_TYPICAL, ""), told.precision)
        fields["block_size"] = None
    return fields


def _require_field(directory: LiteDirectory, field: str, found: object, where: str) -> None:
    told = getattr(directory.manifest, field)
    if told != found:
        raise CheckpointError(
            f"{directory.path / MANIFEST} gives {field} as {told}, but {where} has {found}; export the model again."
        )


def _require_signature(directory: LiteDirectory, graph: Graph, found: Signature, wanted: Signature) -> None:
    for kind, has, needs in (("input", found.inputs, wanted.inputs), ("output", found.outputs, wanted.outputs)):
        for name in [*needs, *(name for name in has if name not in needs)]:
            fault = _fault(has.get(name), needs.get(name))
            if fault:
                raise CheckpointError(
                    f"{directory.graph(graph)} {fault.format(f'{kind} {readable(name)}')}: "
                    "it is the graph of another model or program; export the model again."
                )


def _fault(found: Value | None, wanted: Value | None) -> str | None:
    """What is wrong with an input or output, {} for its name; None if it is as it should be."""
    if wanted is None:
        return "has the {}, which no export of this model has"
    if found is None:
        return f"should have the {{}} of {wanted}, but has none"
    sizes = zip(found.sizes, wanted.sizes, strict=False)
    misshapen = len(found.sizes) != len(wanted.sizes) or any(needs not in (None, has) for has, needs in sizes)
    if misshapen or found.element != wanted.element:
        return f"has the {{}} of {found}, and should have it of {wanted}"
    return None


def _wanted(directory: LiteDirectory) -> dict[Graph, Signature]:
    """What the graphs of this configuration take and give."""
    vision, text = directory.config.vision, directory.config.text
    queries, width, size = directory.config.qformer.num_query_tokens, text.hidden_size, vision.image_size
    inputs = {
        "inputs_embeds": Value("float32", (None, None, width)),
        "position_ids": Value("int64", (None, 2, None)),
        "attention_bias": Value("float32", (None, 1, None, None)),
        "logits_to_keep": Value("int64", (1,)),
    }
    outputs = {"logits": Value("float32", (None, None, text.vocab_size))}
    for name, value in _cache(directory).items():
        inputs[f"past_key_values.{name}"] = outputs[f"present.{name}"] = value
    return {
        "vision_encoder": Signature(
            {"pixels": Value("float32", (None, vision.in_channels, size, size))},
            {"image_embeds": Value("float32", (None, queries, width))},
        ),
        "embed_tokens": Signature(
            {"input_ids": Value("int64", (None, None))}, {"inputs_embeds": Value("float32", (None, None, width))}
        ),
        "decoder": Signature(inputs, outputs),
    }


def _cache(directory: LiteDirectory) -> dict[str, Value]:
    """The parts of the KV cache, by names such as "0.key"."""
    text, kind = directory.config.text, directory.manifest.kv_cache
    if not directory.manifest.use_past:
        return {}
    parts = dict.fromkeys(("key", "value"), Value(kind, (None, text.num_attention_heads, None, text.head_dim)))
    if kind == "int8":
        parts["scales"] = Value("float32", (None, 1, 4 * text.hidden_size))
    return {f"{layer}.{part}": value for layer in range(text.num_hidden_layers) for part, value in parts.items()}
