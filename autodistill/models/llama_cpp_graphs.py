"""What llama.cpp's graphs compute for a described model, and what they do not, in words; no model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.models.families import FAMILIES, GGUF_BY_LAYER, get_family
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, tensors_of

_ACTIVATIONS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    # Field of a config, its default, and what llama.cpp computes. It has only the tanh form of GELU, in half precision.
    "gemma3": ("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh", "gelu_new")),
    "gptneox": ("hidden_act", "gelu", ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")),
}
_SILU = ("hidden_act", "silu", ("silu",))
LAYERS_OF_27B = 62
"""Number of layers by which llama.cpp recognises the Gemma 3 that scales attention by width / heads."""

WINDOWED_GRAPHS = ("gemma3", "gemma4")
"""The graphs that support a sliding window; in all others, each token attends to all earlier tokens."""
FULL, SLIDING = "full_attention", "sliding_attention"


def rotary(config: Mapping[str, Any], layers: str = FULL) -> dict[str, Any]:
    """Return the rotary parameters that a config gives one kind of layer, in any notation.

    Args:
        config: transformers' config.
        layers: `FULL` or `SLIDING`; only Gemma 3 has different parameters for them.

    Returns:
        `rope_type`, `rope_theta`, `partial_rotary_factor`, and any further parameters of that type.
    """
    found = config.get("rope_parameters") or {}
    if get_family(str(config["model_type"])).windows[1]:
        # Each kind of layer has its own. Older configs had separate fields, and their scaling applied to full
        # attention.
        own = dict(found.get(layers) or {})
        if layers == FULL and not own:
            own = dict(config.get("rope_scaling") or {})
        theta = config.get("rope_theta", 1e6) if layers == FULL else config.get("rope_local_base_freq", 1e4)
    else:
        own = dict(found or config.get("rope_scaling") or {})
        theta = config.get("rope_theta", config.get("rotary_emb_base", 10000.0))
    own = {name: value for name, value in own.items() if value is not None}
    own.setdefault("rope_type", own.get("type", "default"))
    own.setdefault("rope_theta", theta)
    turned = config.get("rotary_pct")
    if turned is None:
        turned = 0.25 if config["model_type"] == "gpt_neox" else 1
    own.setdefault("partial_rotary_factor", turned)
    return own


def not_computed(config: Mapping[str, Any], head_dim: int) -> str:
    """Return what a config requires but llama.cpp's graph for its family does not compute, or "".

    Args:
        config: transformers' config of a supported family.
        head_dim: Head dim of the model.
    """
    name = str(config["model_type"])
    graph = get_family(name).gguf
    known = ("default", "linear", "llama3") if graph == "llama" else ("default", "linear")
    kind = rotary(config)["rope_type"]
    if kind not in known:
        return f"the rotary scaling {kind!r} is none of {', '.join(known)}"
    field, default, computed = _ACTIVATIONS.get(graph, _SILU)
    activation = config.get(field) or default
    if activation not in computed:
        return f"llama.cpp computes {name} with {computed[0]}, not with {activation!r}"
    if graph == "gemma3":
        local = rotary(config, SLIDING)["rope_type"]
        if local != "default":
            return f"the rotary scaling {local!r} of layers with a sliding window is not computed"
        scalar = config.get("query_pre_attn_scalar", 256)
        if scalar != head_dim:
            return (
                f"llama.cpp scales attention by the head dim of {head_dim}, not by a query_pre_attn_scalar of {scalar}"
            )
    if graph == "gptneox" and rotary_dims(config, head_dim) % 2:
        return f"it would rotate {rotary_dims(config, head_dim)} channels of a head, which must be pairs"
    return ""


def graph_of(spec: ModelSpec) -> str:
    """Return llama.cpp's name of the graph that computes a model, or of one with differing layers if its layers differ.

    If llama.cpp has no such graph, `cannot_run` says so.
    """
    graph = get_family(spec.architecture).gguf
    return GGUF_BY_LAYER.get(graph, graph) if spec.ffn_widths else graph


def rotary_dims(config: Mapping[str, Any], head_dim: int) -> int:
    """Return the number of channels of a head that are rotated."""
    return int(head_dim * rotary(config)["partial_rotary_factor"])


def cannot_run(spec: ModelSpec) -> str:
    """Return why llama.cpp cannot run a model of this shape with its tokenizer, or "" if it can."""
    if spec.not_in_gguf or spec.text_not_in_gguf:
        return spec.not_in_gguf or spec.text_not_in_gguf
    if spec.architecture not in FAMILIES:
        return ""  # it is not known what its graph computes
    graph = get_family(spec.architecture).gguf
    if spec.ffn_widths and graph not in GGUF_BY_LAYER:
        return (
            f"llama.cpp computes {spec.architecture} with one FFN width in all layers, and these have "
            f"{min(spec.ffn_widths)} to {max(spec.ffn_widths)} neurons: give all layers the same number, or leave GGUF "
            "out"
        )
    if graph == "gptneox":
        if spec.tied:
            return "llama.cpp has no tied head for gpt_neox"
        biases = any(".attention." in tensor.name for tensor in tensors_of(spec.tensors, Role.BIAS))
        return "" if biases else "llama.cpp has no gpt_neox without biases in its attention"
    if graph == "gemma3":
        if tensors_of(spec.tensors, Role.BIAS):
            return "llama.cpp has no biases for gemma3_text"
        if spec.layers == LAYERS_OF_27B and spec.width // spec.heads != spec.head_dim:
            return f"llama.cpp takes {spec.layers} layers for those of the 27B model, and scales attention by its width"
        return "" if window_period(spec) else _broken_pattern(spec)
    if graph == "qwen2" and spec.heads * spec.head_dim != spec.width:
        return (
            f"llama.cpp takes {spec.heads} heads of {spec.architecture} to fill its width of {spec.width}, and they "
            f"have {spec.head_dim} channels each"
        )
    if spec.window and spec.window < spec.max_context:
        return (
            f"llama.cpp has no sliding window of {spec.window} tokens for {spec.architecture}: set sliding_window to "
            f"null and max_position_embeddings to {spec.window} in the model's config.json"
        )
    return ""


def window_period(spec: ModelSpec) -> int | None:
    """Return n if every n-th layer has full attention and all others a sliding window, or None if no n fits."""
    full = [layer for layer in range(spec.layers) if layer not in set(spec.windowed)]
    period = full[0] + 1 if full else spec.layers + 1
    return period if full == list(range(period - 1, spec.layers, period)) else None


def _broken_pattern(spec: ModelSpec) -> str:
    full = [str(layer + 1) for layer in range(spec.layers) if layer not in set(spec.windowed)]
    return (
        f"llama.cpp gives every n-th layer of {spec.architecture} full attention, and of these {spec.layers} it is "
        f"{', '.join(full)}: keep all layers, or leave out one block (init.layers contiguous or influence) whose "
        "length is the distance from one full attention to the next, or a multiple of it"
    )


@dataclass(frozen=True)
class RowOrder:
    """How the rows of a weight are permuted between transformers and a graph of llama.cpp.

    Attributes:
        shape: transformers' rows as (blocks, parts of a block, rows of a part); -1 stands for the one that follows.
        axes: The two of these axes that are swapped.
    """

    shape: tuple[int, int, int]
    axes: tuple[int, int]

    def to_graph(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return rows in the order of the graph: weights, their packed bytes or a bias, of shape [rows, ...]."""
        return self._swapped(rows, self.shape)

    def to_transformers(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The inverse of `to_graph`."""
        shape, (one, other) = list(self.shape), self.axes
        shape[one], shape[other] = shape[other], shape[one]
        return self._swapped(rows, shape)

    def _swapped(self, rows: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(rows.reshape(*shape, *rows.shape[1:]).swapaxes(*self.axes)).reshape(rows.shape)


def row_order(graph: str, name: str, heads: int, kv_heads: int) -> RowOrder | None:
    """Return the row order of a tensor if the graph's order differs from that of transformers, else None.

    Within a head, transformers rotates row i together with row i + half. llama.cpp's "llama" and "deci" graphs rotate
    rows 2i and 2i + 1 together. In GPT-NeoX, transformers stores queries, keys and values head by head. llama.cpp's
    "gptneox" stores the queries of all heads together, then their keys, then their values.

    Args:
        graph: llama.cpp's name of the graph.
        name: GGUF's name of the tensor, like "blk.0.attn_q.weight".
        heads, kv_heads: Head counts of the model.
    """
    found = re.fullmatch(r"blk\.\d+\.attn_(q|k|qkv)\.(?:weight|bias)", name)
    if found and graph in ("llama", "deci"):
        return RowOrder((heads if found[1] == "q" else kv_heads, 2, -1), (1, 2))
    if found and graph == "gptneox":
        return RowOrder((heads, 3, -1), (0, 1))
    return None
