"""The graph `embed_tokens`: input_ids → inputs_embeds."""

from __future__ import annotations

from onnx import TensorProto

from visualglm.config import TextConfig
from visualglm.export.layers import Layers
from visualglm.export.linear import LayerError
from visualglm.export.onnx_graph import CONTRIB
from visualglm.export.quantize import quantize_embedding

_NAME = "text.word_embeddings.weight"


def add_embed_tokens(layers: Layers, config: TextConfig, block_size: int | None) -> None:
    """input_ids: int64 [batch, sequence] → inputs_embeds: float32 [batch, sequence, width].

    The table is kept as it is stored, or with `block_size` as int8 in blocks along the width.
    """
    graph = layers.graph
    ids = graph.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
    if block_size is None:
        rows = layers.rows(_NAME)
        table = graph.weight(_NAME, rows.onnx_type, rows.shape, rows.stored_pieces())
        embeds = graph.cast(graph.node("Gather", table, ids), TensorProto.FLOAT)
    else:
        embeds = _quantized(layers, ids, block_size)
    graph.output("inputs_embeds", embeds, TensorProto.FLOAT, ["batch", "sequence", config.hidden_size])


def _quantized(layers: Layers, ids: str, block_size: int) -> str:
    graph = layers.graph
    table = quantize_embedding(layers.rows(_NAME), block_size, name=_NAME)
    layers.errors.append(LayerError(_NAME.removesuffix(".weight"), 8, True, table.error))
    data = graph.weight(_NAME, TensorProto.UINT8, table.data.shape, [table.data])
    scales = graph.weight("text.word_embeddings.scales", TensorProto.FLOAT, table.scales.shape, [table.scales])
    return graph.node(
        "GatherBlockQuantized",
        *(data, ids, scales),
        domain=CONTRIB,
        bits=8,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
