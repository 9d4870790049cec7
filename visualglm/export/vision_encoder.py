"""The graph `vision_encoder`: pixels → ViT → Q-Former → projection → image_embeds."""

from __future__ import annotations

from onnx import TensorProto

from visualglm.config import QFormerConfig, VisionConfig, VisualGLMConfig
from visualglm.export.layers import Layers
from visualglm.export.onnx_graph import Shape


def add_vision_encoder(layers: Layers, config: VisualGLMConfig) -> None:
    """pixels: float32 [batch, 3, S, S] → image_embeds: float32 [batch, queries, text width]."""
    graph, size = layers.graph, config.vision.image_size
    pixels = graph.input("pixels", TensorProto.FLOAT, ["batch", config.vision.in_channels, size, size])
    batch = graph.node("Shape", pixels, start=0, end=1)
    vision = _vit(layers, config.vision, graph.cast(pixels, graph.float_type), batch)
    embeds = layers.linear(_qformer(layers, config.qformer, vision, batch), "projection")
    shape: Shape = ["batch", config.qformer.num_query_tokens, config.text.hidden_size]
    graph.output("image_embeds", graph.cast(embeds, TensorProto.FLOAT), TensorProto.FLOAT, shape)


def _vit(layers: Layers, config: VisionConfig, pixels: str, batch: str) -> str:
    """[batch, 1 + patches, width], the class token first."""
    graph, patch = layers.graph, config.patch_size
    weight, bias = layers.parameter("vision.patch_embed.weight"), layers.parameter("vision.patch_embed.bias")
    patches = graph.node("Conv", pixels, weight, bias, strides=[patch, patch], kernel_shape=[patch, patch])
    flat = graph.node("Reshape", patches, graph.constant("flat", [0, 0, -1]))
    tokens = graph.node("Transpose", flat, perm=[0, 2, 1])
    class_token = _repeat(layers, "vision.class_token", batch)
    x = graph.node("Concat", class_token, tokens, axis=1)
    x = graph.node("Add", x, layers.parameter("vision.position_embeddings"))
    for index in range(config.num_hidden_layers):
        name = f"vision.layers.{index}"
        normed = layers.layer_norm(x, f"{name}.norm1", config.layer_norm_eps)
        attended = layers.self_attention(normed, f"{name}.attention", config.num_attention_heads)
        x = graph.node("Add", x, attended)
        normed = layers.layer_norm(x, f"{name}.norm2", config.layer_norm_eps)
        x = graph.node("Add", x, layers.mlp(normed, f"{name}.mlp", "none"))
    return layers.layer_norm(x, "vision.norm", config.final_layer_norm_eps)


def _qformer(layers: Layers, config: QFormerConfig, vision: str, batch: str) -> str:
    """[batch, queries, width]."""
    graph, heads, epsilon = layers.graph, config.num_attention_heads, config.layer_norm_eps
    x = _repeat(layers, "qformer.query_tokens", batch)
    for index in range(config.num_hidden_layers):
        name = f"qformer.layers.{index}"
        x = layers.layer_norm(x, f"{name}.input_norm", epsilon)
        attended = layers.self_attention(x, f"{name}.attention", heads)
        x = layers.layer_norm(graph.node("Add", x, attended), f"{name}.attention_norm", epsilon)
        if index in config.cross_attention_layers:
            seen = _cross_attention(layers, x, vision, f"{name}.cross_attention", heads)
            x = layers.layer_norm(graph.node("Add", x, seen), f"{name}.cross_attention_norm", epsilon)
        x = graph.node("Add", x, layers.mlp(x, f"{name}.mlp", "none"))
    return layers.layer_norm(x, "qformer.norm", epsilon)


def _cross_attention(layers: Layers, x: str, vision: str, name: str, heads: int) -> str:
    k, v = layers.graph.nodes("Split", layers.linear(vision, f"{name}.kv"), outputs=2, axis=-1, num_outputs=2)
    return layers.attention(layers.linear(x, f"{name}.q"), k, v, name, heads)


def _repeat(layers: Layers, name: str, batch: str) -> str:
    """A learned [tokens, width] for every row of the batch."""
    graph = layers.graph
    shape = graph.node("Concat", batch, graph.constant("ones", [1, 1]), axis=0)
    return graph.node("Expand", layers.parameter(name), shape)
