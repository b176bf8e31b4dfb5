"""What a token takes in each layer of a described model: keys and values, activations, and the attention window."""

from __future__ import annotations

from fractions import Fraction

from autodistill.models.families import FAMILIES, graph_named
from autodistill.models.llama_cpp_graphs import WINDOWED_GRAPHS
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec, tensors_ending, tensors_of
from autodistill.quantization.formats import CACHE_BYTES

_WINDOWED = ("transformers", "vllm")  # runtimes that know the sliding window of every family


def kv_bytes(spec: ModelSpec, layers: int, tokens: int, cache_types: tuple[str, str]) -> int:
    """Return the bytes of keys and values of `tokens` tokens in some layers. Latents are cached once, as keys."""
    return _kv_bytes(layers * (spec.latent or spec.kv_heads * spec.head_dim), tokens, cache_types, latent=spec.latent)


def cached_bytes(spec: ModelSpec, runtime: str, full: int, windowed: int, cache_types: tuple[str, str]) -> int:
    """Return the bytes of keys and values in all layers, each with its own width.

    Args:
        spec: The model.
        runtime: The runtime that serves it; it may know no windows.
        full, windowed: Tokens that a layer without a window, and one with a window, holds.
        cache_types: Types of keys and of values.
    """
    narrow = set(spec.windowed) if window_in(spec, runtime)[0] else set()
    if not spec.kv_widths:
        wide = kv_bytes(spec, spec.layers - len(narrow), full, cache_types)
        return wide + kv_bytes(spec, len(narrow), windowed, cache_types)
    found = 0
    for tokens, layers in ((full, set(range(spec.layers)) - narrow), (windowed, narrow)):
        found += _kv_bytes(sum(spec.kv_widths[layer] for layer in layers), tokens, cache_types)
    return found


def _kv_bytes(row: int, tokens: int, cache_types: tuple[str, str], latent: int = 0) -> int:
    """Return the bytes of tokens that each have a row of keys and, unless the keys are latents, a row of values."""
    sizes = [Fraction(*CACHE_BYTES[kind]) for kind in cache_types]
    return int(tokens * row * (sizes[0] if latent else sum(sizes)))


def window_in(spec: ModelSpec, runtime: str) -> tuple[int, int]:
    """Return the sliding window that a runtime uses, in tokens, and its number of layers; (0, 0) for none.

    llama.cpp uses windows only in the graphs of some families. In all others it reads the whole context. So do ONNX
    graphs, which compute the scores of all tokens.
    """
    known = runtime in _WINDOWED or (runtime == "llama.cpp" and graph_named(spec.architecture) in WINDOWED_GRAPHS)
    return (spec.window, spec.windowed_layers) if known and spec.window else (0, 0)


def active_ffn(spec: ModelSpec) -> int:
    """Return the FFN neurons that a token passes through, in the layer with the most."""
    active = spec.ffn_width * max(1, spec.active_experts + spec.shared_experts)
    if not (spec.latent and spec.experts):
        return active
    # The first layers of such models have one FFN that is wider than an expert.
    return max([active, *_rows(spec, ".mlp.gate_proj.weight")])


def _rows(spec: ModelSpec, suffix: str) -> list[int]:
    return [tensor.shape[0] for tensor in tensors_ending(spec.tensors, suffix)]


def activation_rows(spec: ModelSpec) -> int:
    """Return the values of a token in a layer: four rows of the width, and three of the FFN (two without a gate)."""
    return 4 * spec.width + active_ffn(spec) * _ffn_rows(spec)


def all_activation_rows(spec: ModelSpec) -> int:
    """Return the values of a token in all layers, each with its own FFN width."""
    narrower = sum(spec.ffn_width - width for width in spec.ffn_by_layer)
    return spec.layers * activation_rows(spec) - narrower * _ffn_rows(spec)


def _ffn_rows(spec: ModelSpec) -> int:
    return 3 if gated(spec) else 2


def fused_rows(spec: ModelSpec) -> tuple[int, ...]:
    family = FAMILIES.get(spec.architecture)
    return (3 * spec.heads * spec.head_dim,) if family and family.fused else ()


def gated(spec: ModelSpec) -> bool:
    """Return whether the model's FFN has a gate. Architectures that are described but not supported all have one."""
    return spec.architecture not in FAMILIES or FAMILIES[spec.architecture].gated


def latent_attention(spec: ModelSpec) -> int:
    """Return the values of a token in latent attention: queries (as long as the cached latents) and outputs."""
    return spec.heads * (spec.head_dim + spec.latent + max(_rows(spec, ".kv_a_layernorm.weight")))


def recurrent_rows(spec: ModelSpec) -> int:
    """Return a token's values at the peak of llama.cpp's "qwen35" in a layer without its FFN; 0 for other graphs.

    In layers with a recurrent state these are queries, keys and values twice, or the values three times. In full
    attention they are the queries with their gates, twice. Read off llama.cpp's log; at most 4% more than the log
    states.
    """
    made = max(_rows(spec, ".linear_attn.in_proj_qkv.weight"), default=0)
    values = max(_rows(spec, ".linear_attn.in_proj_z.weight"), default=0)
    gates = max(_rows(spec, ".self_attn.q_proj.weight"), default=0)
    return max(2 * made, 3 * values, 2 * gates) if made else 0


def rows_by_layer(spec: ModelSpec) -> int:
    """Return the number of a token's values that are looked up for all layers together, beyond the embedding."""
    return sum(one.shape[1] for one in tensors_of(spec.tensors, Role.EMBEDDING) if is_further_table(one, spec))


def is_further_table(tensor: TensorSpec, spec: ModelSpec) -> bool:
    """Return whether a tensor is a table of tokens other than the embedding table; such a table is never the head."""
    return tensor.role is Role.EMBEDDING and tensor.shape != (spec.vocabulary, spec.width)
