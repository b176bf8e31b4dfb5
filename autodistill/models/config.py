"""The shape of a model, from its config.json and back, and the same model in other sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

from autodistill.errors import InputError
from autodistill.models.config_fields import FFN, check_config
from autodistill.models.families import FAMILIES, Axis, get_family
from autodistill.models.llama_cpp_graphs import FULL, SLIDING, not_computed
from autodistill.models.spec import MOST_LAYERS, MOST_OF_A_SIZE, ModelSpec
from autodistill.models.tensors import Entry, Layout, Role, Tensors

ARCHITECTURES = tuple(FAMILIES)
"""transformers' `model_type`s that can be described."""

_MAX_WINDOW_LAYERS = 28  # transformers' own default for the families that have the field


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """Describe a model from its transformers config, without loading it.

    Names and shapes are those of transformers' own modules for the architecture.

    Args:
        config: Content of `config.json`, or the result of a config's `to_dict()`.

    Raises:
        InputError: The architecture, or one of its features that the config uses, is not supported. A size is missing
            or is no positive number, or heads do not divide what they should divide. Also raised as by `check_config`.
    """
    check_config(config)
    architecture = str(config.get("model_type"))
    family = get_family(architecture)
    for name in family.off:
        if config.get(name):
            raise InputError(f"the model's config sets {name}, which is not supported for {architecture}")
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = heads if family.heads_fill_width else _size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(
            f"the model's config has {kv_heads} heads of keys and values, which do not divide {heads} heads"
        )
    own = not family.heads_fill_width and (config.get("head_dim") is not None or family.head_dim)
    if width % heads and not own:
        raise InputError(f"the model's config has {heads} heads, which do not divide a width of {width}: check it")
    spec = ModelSpec(
        architecture=architecture,
        layers=_size(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads
        if family.heads_fill_width
        else _size(config, "head_dim", family.head_dim or width // heads),
        ffn_width=_size(config, FFN),
        vocabulary=_size(config, "vocab_size"),
        max_context=_size(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        tensors=(),
    )
    window, windowed = _windows(config, spec.layers)
    spec = replace(spec, window=window, windowed=windowed, not_in_gguf=_not_in_gguf(config, spec))
    spec = _with_widths(spec, _ffn_widths(config, spec))
    fields = tuple((name, bool(config.get(name, default))) for name, default in family.conditions)
    kinds, layout = _layout(architecture, spec.layers, spec.tied, fields)
    if spec.ffn_widths:
        return replace(spec, tensors=_tensors(spec, (entry[:2] for entry in layout.entries)))
    lengths = _lengths(spec)
    return replace(spec, tensors=Tensors(layout, [tuple(lengths[axis] for axis in axes) for axes in kinds]))


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the smallest config from which `spec_from_config` describes the model; rows store their student's.

    Raises:
        InputError: A mixture of experts, which no family describes.
    """
    get_family(spec.architecture)
    if spec.experts:
        raise InputError("the shape of a mixture of experts is not kept")
    names = {name.rpartition(".layers.0.")[2] for tensor in spec.tensors if (name := tensor.name).endswith(".bias")}
    own = per_layer_config(spec)
    return {
        "model_type": spec.architecture,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn_width,
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.max_context,
        "tie_word_embeddings": spec.tied,
        "attention_bias": bool(names & {"self_attn.q_proj.bias", "attention.dense.bias"}),
        "mlp_bias": "mlp.up_proj.bias" in names,
        "sliding_window": spec.window or None,
        "layer_types": [SLIDING if layer in spec.windowed else FULL for layer in range(spec.layers)],
        "not_in_gguf": spec.not_in_gguf or spec.text_not_in_gguf,
        **({"per_layer_config": own} if own else {}),
    }


def per_layer_config(spec: ModelSpec) -> dict[str, dict[str, int]]:
    """Return transformers' field for layers whose FFN is narrower than the widest; empty if no layer's is.

    Layer numbers are padded with zeros to the digits of the largest one, as transformers writes them.
    """
    narrow = [layer for layer, width in enumerate(spec.ffn_widths) if width < spec.ffn_width]
    return {str(layer).zfill(len(str(narrow[-1]))): {FFN: spec.ffn_widths[layer]} for layer in narrow}


_SIZES = itemgetter(
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size"),
)

_ALIKE = itemgetter(
    *("model_type", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window"),
)


def comparable(config: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Return what two models must have in common to be compared by size, and their sizes.

    Suppose that two models are packed alike and one is no smaller than the other in any size. It then takes no less
    memory and no less time, under any load on any device. This holds if the rows of both are `in_blocks` alike, and if
    layers that differ within a model do so alike in both. Otherwise the rows of a narrower model may not fit the blocks
    of K-quants, so that another grid stands in. Such a model may take more bytes and more time than a wider one. A
    caller that skips models by size must therefore compare `in_blocks` too.

    Args:
        config: A config as `config_of` returns it.
    """
    full = config["layer_types"].count(FULL)
    own = tuple((layer, *sizes.values()) for layer, sizes in config.get("per_layer_config", {}).items())
    return (*_ALIKE(config), own), (*_SIZES(config), full, config["num_hidden_layers"] - full)


def _not_in_gguf(config: Mapping[str, Any], spec: ModelSpec) -> str:
    """Return what llama.cpp does not compute for a config (see `not_computed`); a stored row has the answer already."""
    known = config.get("not_in_gguf")
    return not_computed(config, spec.head_dim) if known is None else str(known)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, tuple[int, ...]]:
    """Return the sliding window of a config, and the layers that have one, as transformers defines them."""
    family, kinds = get_family(str(config["model_type"])), config.get("layer_types")
    usual, period = family.windows
    window = config.get("sliding_window", usual)
    # The config that a row stores gives the kind of each layer, and has no switch.
    used = _given(config, "use_sliding_window", bool(kinds) or not family.late_windows)
    if not window or not used:
        return 0, ()
    period = config.get("sliding_window_pattern") or period
    if kinds:
        windowed = [layer for layer, kind in enumerate(kinds[:layers]) if kind == SLIDING]
    elif family.late_windows:
        windowed = list(range(_given(config, "max_window_layers", _MAX_WINDOW_LAYERS), layers))
    else:
        windowed = [layer for layer in range(layers) if not period or (layer + 1) % period]
    return (window, tuple(windowed)) if windowed else (0, ())


def _ffn_widths(config: Mapping[str, Any], spec: ModelSpec) -> tuple[int, ...]:
    """Return the FFN's width in each layer, as transformers reads a config."""
    widths = [spec.ffn_width] * spec.layers
    given = {int(layer): own for layer, own in (config.get("per_layer_config") or {}).items()}
    if len(given) < len(config.get("per_layer_config") or {}) or any(layer >= spec.layers for layer in given):
        raise InputError(
            f"the model's config must give per_layer_config for some of its {spec.layers} layers, counted from 0, and "
            "each once: check it"
        )
    for layer, own in given.items():
        widths[layer] = _size(own, FFN)
    return tuple(widths)


def _with_widths(spec: ModelSpec, widths: tuple[int, ...]) -> ModelSpec:
    """Return a description with these FFN widths, one for each layer, without its tensors."""
    alike = len(set(widths)) == 1
    return replace(spec, ffn_width=max(widths), ffn_widths=() if alike else widths)


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        found = "is missing from it" if value is None else f"is {value!r}"
        raise InputError(f"the model's config must give {name} as a positive whole number, but it {found}")
    if value > (MOST_LAYERS if name == "num_hidden_layers" else MOST_OF_A_SIZE):
        raise InputError(f"the model's config gives {name} as {value}, which no model has: check it")
    return value


def _lengths(spec: ModelSpec) -> dict[Axis, int]:
    return {
        Axis.VOCABULARY: spec.vocabulary,
        Axis.WIDTH: spec.width,
        Axis.FFN: spec.ffn_width,
        Axis.QUERIES: spec.heads * spec.head_dim,
        Axis.KEYS: spec.kv_heads * spec.head_dim,
        Axis.FUSED: 3 * spec.heads * spec.head_dim,
        Axis.HEAD: spec.head_dim,
    }


@lru_cache(256)
def _layout(
    architecture: str, layers: int, tied: bool, fields: tuple[tuple[str, bool], ...]
) -> tuple[tuple[tuple[Axis, ...], ...], Layout]:
    """Return the axes of each kind of tensor, and the tensors of each kind; models of different sizes share this."""
    family, kinds, found = get_family(architecture), dict[tuple[Axis, ...], int](), []
    for name, role in family.tensors(dict(fields), layers, tied):
        index = kinds.setdefault(family.axes(name), len(kinds))
        found.append(Entry(name, role, family.more_bits(name, layers, tied), index))
    return tuple(kinds), Layout(found)


def resized(spec: ModelSpec, layers: Sequence[int] | None = None, **sizes: int | str | tuple[int, ...]) -> ModelSpec:
    """Return the same model with other sizes.

    Args:
        spec: The model.
        layers: Which of its layers are kept; all by default.
        sizes: The other fields of the description that differ. `ffn_width` sets the width of every layer, `ffn_widths`
            one width for each layer.
    """
    kept = range(spec.layers) if layers is None else layers
    widths = tuple(spec.ffn_by_layer[layer] for layer in kept)
    windowed = tuple(new for new, old in enumerate(kept) if old in set(spec.windowed))
    changed = replace(spec, layers=len(kept), windowed=windowed, window=spec.window if windowed else 0)
    if "ffn_width" in sizes:
        widths = (int(sizes.pop("ffn_width")),) * len(kept)  # type: ignore[arg-type]
    widths = sizes.pop("ffn_widths", widths)  # type: ignore[assignment]
    changed = _with_widths(replace(changed, **sizes), widths)  # type: ignore[arg-type]
    family = get_family(spec.architecture)
    named = ((tensor.name, tensor.role) for tensor in spec.tensors)
    there = ((name, role) for name, role in named if (family.layer_part(name) or (0,))[0] < changed.layers)
    return replace(changed, tensors=_tensors(changed, there))


def uniform(spec: ModelSpec) -> ModelSpec:
    """Return a model that computes the same with all layers as wide as the widest; the added neurons are zero."""
    return resized(spec, ffn_width=spec.ffn_width)


def _tensors(spec: ModelSpec, named: Iterable[tuple[str, Role]]) -> Tensors:
    """Return the tensors with these names and roles, in the shapes that a description gives them."""
    family, lengths = get_family(spec.architecture), _lengths(spec)
    found, shapes = [], dict[tuple[int, ...], int]()
    for name, role in named:
        layer = (family.layer_part(name) or (0,))[0]
        lengths[Axis.FFN] = spec.ffn_by_layer[layer]
        shape = tuple(lengths[axis] for axis in family.axes(name))
        more_bits = family.more_bits(name, spec.layers, spec.tied)
        found.append(Entry(name, role, more_bits, shapes.setdefault(shape, len(shapes))))
    return Tensors(Layout(found), tuple(shapes))
