"""The graph of a decoder in ONNX for both prompts and single tokens, with the KV cache as inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from autodistill.export.graphs.onnx_graph import Graph, Value, Weights
from autodistill.models.families import get_family
from autodistill.models.llama_cpp_graphs import FULL, SLIDING
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Floats

if TYPE_CHECKING:
    from onnx import ModelProto

# Added to the scores of hidden tokens. It is finite, so that padding, which sees no tokens, still gives numbers.
_UNSEEN = -3e4
_ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "gelu": ("Gelu", {}),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), ("Gelu", {"approximate": "tanh"})),
    "relu": ("Relu", {}),
    "silu": ("Silu", {}),
}


def unsupported(config: Mapping[str, Any]) -> str:
    """Return what a config requires that these graphs do not compute, or ""."""
    activation = activation_of(config)
    if activation not in _ACTIVATIONS:
        return f"the activation {activation!r} is none of {', '.join(_ACTIVATIONS)}"
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [given, *(one for one in given.values() if isinstance(one, Mapping))]
    for one in kinds:
        kind = one.get("rope_type", one.get("type", "default"))
        if kind in ("dynamic", "longrope"):
            return f"the rotary scaling {kind!r} depends on the length of the text"
    return ""


def activation_of(config: Mapping[str, Any]) -> str:
    """Return transformers' name of the activation of a model's feed-forward layers."""
    default = {"gemma3_text": "gelu_pytorch_tanh", "gpt_neox": "gelu"}.get(str(config["model_type"]), "silu")
    name = "hidden_activation" if config["model_type"] == "gemma3_text" else "hidden_act"
    return str(config.get(name) or default)


class Decoder:
    """Adds the nodes of a whole decoder with `build`.

    Args:
        graph: Receives the nodes.
        weights: The weights of every tensor of the model.
        spec: Shape of the model.
        config: transformers' config.
        rotary: By kind of layer, the frequencies, float32 [rotated channels / 2], and the factor of sine and cosine.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        spec: ModelSpec,
        config: Mapping[str, Any],
        rotary: Mapping[str, tuple[Floats, float]],
    ) -> None:
        self._graph, self._weights, self._spec, self._config, self._rotary = graph, weights, spec, config, rotary
        self._family = get_family(spec.architecture)
        self._shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
        self._eps = float(
            config.get("layer_norm_eps", 1e-5) if self._family.norm_bias else config.get("rms_norm_eps", 1e-6)
        )
        scalar = config.get("query_pre_attn_scalar", 256) if spec.architecture == "gemma3_text" else spec.head_dim
        self._scale = float(scalar) ** -0.5

    def build(self, properties: Mapping[str, str]) -> ModelProto:
        """Return the graph. It maps tokens, mask, positions and cache to logits and the extended cache."""
        from onnx import TensorProto
        from onnx.helper import make_tensor_value_info as info

        graph, spec, body = self._graph, self._spec, self._family.body
        cached: list[str | int | None] = ["batch", spec.kv_heads, "past", spec.head_dim]
        inputs = [
            info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            info("position_ids", TensorProto.INT64, ["batch", "sequence"]),
        ]
        outputs = [info("logits", graph.type, ["batch", "sequence", spec.vocabulary])]
        for layer in range(spec.layers):
            for part in ("key", "value"):
                inputs.append(info(f"past_key_values.{layer}.{part}", graph.type, cached))
                outputs.append(info(f"present.{layer}.{part}", graph.type, [*cached[:2], "total", cached[3]]))
        masks = self._masks()
        turns = {kind: self._turn(kind, *values) for kind, values in self._rotary.items()}
        hidden = self._weights.table(f"{body}.{self._family.embedding}.weight", "input_ids")
        if self._family.scaled_embeddings:
            hidden = graph.op("Mul", hidden, graph.number(math.sqrt(spec.width)))
        for layer in range(spec.layers):
            kind = SLIDING if layer in spec.windowed else FULL
            turn = turns[kind] if kind in turns else turns[FULL]
            hidden = self._block(layer, hidden, masks[kind], turn)
        hidden = self._norm(f"{body}.{self._family.final_norm}", hidden)
        head = f"{body}.{self._family.embedding}.weight" if spec.tied else "lm_head.weight"
        logits = self._weights.product(head, hidden, self._shapes[head])
        graph.ops("Identity", logits, outputs=["logits"])
        return graph.model(inputs, outputs, properties)

    def _block(self, layer: int, hidden: Value, mask: Value, turn: tuple[Value, Value]) -> Value:
        prefix = f"{self._family.body}.layers.{layer}"
        add, norm = partial(self._graph.op, "Add"), self._norm
        attended = self._attention(layer, norm(f"{prefix}.input_layernorm", hidden), mask, turn)
        if self._family.fused:
            if self._config.get("use_parallel_residual", True):
                beside = self._ffn(prefix, norm(f"{prefix}.post_attention_layernorm", hidden))
                return add(add(beside, attended), hidden)
            hidden = add(attended, hidden)
            return add(self._ffn(prefix, norm(f"{prefix}.post_attention_layernorm", hidden)), hidden)
        if "pre_feedforward_layernorm" in self._family.norms:
            hidden = add(hidden, norm(f"{prefix}.post_attention_layernorm", attended))
            inner = self._ffn(prefix, norm(f"{prefix}.pre_feedforward_layernorm", hidden))
            return add(hidden, norm(f"{prefix}.post_feedforward_layernorm", inner))
        hidden = add(hidden, attended)
        return add(hidden, self._ffn(prefix, norm(f"{prefix}.post_attention_layernorm", hidden)))

    def _attention(self, layer: int, inputs: Value, mask: Value, turn: tuple[Value, Value]) -> Value:
        graph, spec = self._graph, self._spec
        prefix = f"{self._family.body}.layers.{layer}"
        if self._family.fused:
            mixed = self._linear(f"{prefix}.attention.query_key_value", inputs)
            apart = graph.op("Reshape", mixed, graph.constant([0, 0, spec.heads, 3 * spec.head_dim]))
            heads = graph.op("Transpose", apart, perm=[0, 2, 1, 3])
            queries, keys, values = graph.ops("Split", heads, outputs=3, axis=-1, num_outputs=3)
            last = f"{prefix}.attention.dense"
        else:
            queries, keys, values = (
                self._heads(f"{prefix}.self_attn.{part}", inputs, count)
                for part, count in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
            )
            last = f"{prefix}.self_attn.o_proj"
        found = graph.ops(
            "Attention",
            self._turned(queries, turn),
            self._turned(keys, turn),
            values,
            mask,
            f"past_key_values.{layer}.key",
            f"past_key_values.{layer}.value",
            outputs=[f"layers.{layer}.attention", f"present.{layer}.key", f"present.{layer}.value"],
            scale=self._scale,
        )
        together = graph.op("Transpose", found[0], perm=[0, 2, 1, 3])
        flat = graph.op("Reshape", together, graph.constant([0, 0, spec.heads * spec.head_dim]))
        return self._linear(last, flat)

    def _heads(self, name: str, inputs: Value, count: int) -> Value:
        """Return queries, keys or values, [batch, heads, sequence, head dim]."""
        graph = self._graph
        mixed = self._linear(f"{name}_proj", inputs)
        apart = graph.op("Reshape", mixed, graph.constant([0, 0, count, self._spec.head_dim]))
        if f"{name}_norm.weight" in self._weights:
            apart = self._norm(f"{name}_norm", apart)
        return graph.op("Transpose", apart, perm=[0, 2, 1, 3])

    def _ffn(self, prefix: str, inputs: Value) -> Value:
        if not self._family.gated:
            inner = self._activated(self._linear(f"{prefix}.mlp.dense_h_to_4h", inputs))
            return self._linear(f"{prefix}.mlp.dense_4h_to_h", inner)
        gate = self._activated(self._linear(f"{prefix}.mlp.gate_proj", inputs))
        inner = self._graph.op("Mul", gate, self._linear(f"{prefix}.mlp.up_proj", inputs))
        return self._linear(f"{prefix}.mlp.down_proj", inner)

    def _activated(self, inputs: Value) -> Value:
        kind, attributes = _ACTIVATIONS[activation_of(self._config)]
        if kind == "Silu":
            return self._graph.op("Mul", inputs, self._graph.op("Sigmoid", inputs))
        return self._graph.op(kind, inputs, **attributes)

    def _linear(self, name: str, inputs: Value) -> Value:
        outputs = self._weights.product(f"{name}.weight", inputs, self._shapes[f"{name}.weight"])
        if f"{name}.bias" not in self._weights:
            return outputs
        return self._graph.op("Add", outputs, self._graph.own(self._weights.vector(f"{name}.bias")))

    def _norm(self, name: str, inputs: Value) -> Value:
        """Return normalised inputs, computed in float32 as in transformers."""
        graph = self._graph
        wide = graph.widened(inputs)
        factors = self._weights.vector(f"{name}.weight")
        if self._family.norm_bias:
            bias = self._weights.vector(f"{name}.bias")
            normed = graph.op("LayerNormalization", wide, factors, bias, axis=-1, epsilon=self._eps)
        else:
            normed = graph.op("RMSNormalization", wide, factors, axis=-1, epsilon=self._eps)
        return graph.own(normed)

    def _masks(self) -> dict[str, Value]:
        """Return the values that are added to scores, [batch, 1, sequence, total]: 0, or a large negative number.

        A token sees itself and earlier tokens that are in the mask. In a layer with a sliding window, it sees at most
        as many tokens as the window has.
        """
        from onnx import TensorProto

        graph, spec = self._graph, self._spec
        size = graph.op("Shape", "input_ids", start=1, end=2)
        total = graph.op("Shape", "attention_mask", start=1, end=2)
        numbers = graph.op("Range", graph.constant(0), graph.op("Squeeze", total), graph.constant(1))
        behind = graph.op("Slice", numbers, graph.op("Sub", total, size), total)
        own = graph.op("Unsqueeze", behind, graph.constant([1]))
        there = graph.op("Cast", graph.op("Unsqueeze", "attention_mask", graph.constant([1, 2])), to=TensorProto.BOOL)
        seen = {FULL: graph.op("And", there, graph.op("LessOrEqual", numbers, own))}
        if spec.window:
            first = graph.op("Sub", own, graph.constant(spec.window))
            seen[SLIDING] = graph.op("And", seen[FULL], graph.op("Greater", numbers, first))
        no, yes = graph.number(_UNSEEN), graph.number(0)
        return {kind: graph.op("Where", one, yes, no) for kind, one in seen.items()}

    def _turn(self, kind: str, frequencies: Floats, factor: float) -> tuple[Value, Value]:
        """Return cosine and sine of every position, [batch, 1, sequence, rotated channels / 2]."""
        graph = self._graph
        place = graph.op("Unsqueeze", graph.to("position_ids", graph.wide), graph.constant([1, 3]))
        angles = graph.op("Mul", place, graph.stored(f"rotary.{kind}", frequencies))
        cosine, sine = graph.op("Cos", angles), graph.op("Sin", angles)
        if factor != 1:
            cosine, sine = (graph.op("Mul", one, graph.constant(factor, np.float32)) for one in (cosine, sine))
        return graph.own(cosine), graph.own(sine)

    def _turned(self, heads: Value, turn: tuple[Value, Value]) -> Value:
        """Return heads [batch, heads, sequence, head dim] with their first channels rotated by their position."""
        graph, (cosine, sine) = self._graph, turn
        half = len(next(iter(self._rotary.values()))[0])
        rest = self._spec.head_dim - 2 * half
        sizes = graph.constant([half, half, rest] if rest else [half, half])
        first, second, *others = graph.ops("Split", heads, sizes, outputs=3 if rest else 2, axis=-1)
        left = graph.op("Sub", graph.op("Mul", first, cosine), graph.op("Mul", second, sine))
        right = graph.op("Add", graph.op("Mul", second, cosine), graph.op("Mul", first, sine))
        return graph.op("Concat", left, right, *others, axis=-1)
