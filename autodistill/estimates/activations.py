"""What a token of a described model takes in each layer: keys and values, activations, and within which window."""

from __future__ import annotations

from fractions import Fraction

from autodistill.models.families import FAMILIES
from autodistill.models.llama_cpp_graphs import WINDOWED_GRAPHS
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import CACHE_BYTES

_WINDOWED = ("transformers", "vllm")  # runtimes that know the sliding window of every family


def kv_bytes(spec: ModelSpec, layers: int, tokens: int, cache_types: tuple[str, str]) -> int:
    """Keys and values of `tokens` tokens in some of the layers, or the latents that both are made of, kept as keys."""
    sizes = [Fraction(*CACHE_BYTES[kind]) for kind in cache_types]
    if spec.latent:
        return int(layers * tokens * spec.latent * sizes[0])
    return int(layers * tokens * spec.kv_heads * spec.head_dim * sum(sizes))


def window_in(spec: ModelSpec, runtime: str) -> tuple[int, int]:
    """Return the sliding window that a runtime uses, in tokens, and its number of layers; (0, 0) for none.

    llama.cpp has windows in the graphs of some families alone, and in all others reads what is behind a token whole, as
    do graphs of ONNX, whose scores are of all tokens.
    """
    known = runtime in _WINDOWED or (runtime == "llama.cpp" and _graph(spec) in WINDOWED_GRAPHS)
    return (spec.window, spec.windowed_layers) if known and spec.window else (0, 0)


def active_ffn(spec: ModelSpec) -> int:
    """Return the FFN neurons that a token passes through, in the layer with the most."""
    active = spec.ffn_width * max(1, spec.active_experts + spec.shared_experts)
    if not (spec.latent and spec.experts):
        return active
    # Their first layers have one FFN, wider than an expert.
    return max([active, *_rows(spec, ".mlp.gate_proj.weight")])


def _rows(spec: ModelSpec, suffix: str) -> list[int]:
    return [tensor.shape[0] for tensor in spec.tensors if tensor.name.endswith(suffix)]


def activation_rows(spec: ModelSpec) -> int:
    """Return the values of a token in a layer: four rows of the width, and three of the FFN (two without a gate)."""
    return 4 * spec.width + active_ffn(spec) * _ffn_rows(spec)


def all_activation_rows(spec: ModelSpec) -> int:
    """Return the values of a token in all layers, each with its own width."""
    narrower = sum(spec.ffn_width - width for width in spec.ffn_by_layer)
    return spec.layers * activation_rows(spec) - narrower * _ffn_rows(spec)


def _ffn_rows(spec: ModelSpec) -> int:
    return 3 if gated(spec) else 2


def fused_rows(spec: ModelSpec) -> tuple[int, ...]:
    family = FAMILIES.get(spec.architecture)
    return (3 * spec.heads * spec.head_dim,) if family and family.fused else ()


def gated(spec: ModelSpec) -> bool:
    """Return whether its FFN has a gate, as that of every architecture has which is described and not supported."""
    return spec.architecture not in FAMILIES or FAMILIES[spec.architecture].gated


def _graph(spec: ModelSpec) -> str:
    return FAMILIES[spec.architecture].gguf if spec.architecture in FAMILIES else ""


def latent_attention(spec: ModelSpec) -> int:
    """Return the values of a token in latent attention: queries (as long as what is cached) and outputs."""
    return spec.heads * (spec.head_dim + spec.latent + max(_rows(spec, ".kv_a_layernorm.weight")))
