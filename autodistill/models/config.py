"""The shape of a model, from its config.json and back, and the same model in other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

from autodistill.errors import InputError
from autodistill.models.config_fields import FFN, check_config, size_of, value_of
from autodistill.models.families import FAMILIES, WHOLE_FAMILIES, Axis, get_family, names_of
from autodistill.models.llama_cpp_graphs import FULL, SLIDING, not_computed
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Entry, Layout, Role, Tensors
from autodistill.models.whole.gemma4 import describe_gemma4
from autodistill.models.whole.mixtures import describe_mixture
from autodistill.models.whole.qwen3_5 import RECURRENT, describe_qwen3_5

ARCHITECTURES = tuple(FAMILIES)
"""transformers' `model_type`s whose models can be cut."""

_WHOLE: Mapping[str, Callable[[Mapping[str, Any]], ModelSpec]] = {
    "qwen3_5_text": describe_qwen3_5,
    "gemma4_text": describe_gemma4,
    "qwen3_moe": describe_mixture,
}

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
    if architecture in _WHOLE:
        return _WHOLE[architecture](config)
    family = get_family(architecture)
    for name in family.off:
        if config.get(name):
            raise InputError(f"the model's config sets {name}, which is not supported for {architecture}")
    width, heads = size_of(config, "hidden_size"), size_of(config, "num_attention_heads")
    kv_heads = heads if family.heads_fill_width else size_of(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(
            f"the model's config has {kv_heads} heads of keys and values, which do not divide {heads} heads"
        )
    own = not family.heads_fill_width and (config.get("head_dim") is not None or family.head_dim)
    if width % heads and not own:
        raise InputError(f"the model's config has {heads} heads, which do not divide a width of {width}: check it")
    spec = ModelSpec(
        architecture=architecture,
        layers=size_of(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads
        if family.heads_fill_width
        else size_of(config, "head_dim", family.head_dim or width // heads),
        ffn_width=size_of(config, FFN),
        vocabulary=size_of(config, "vocab_size"),
        max_context=size_of(config, "max_position_embeddings"),
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
        InputError: A mixture of experts that no family describes.
    """
    family = names_of(spec.architecture)
    if spec.experts and spec.architecture not in WHOLE_FAMILIES:
        raise InputError("the shape of a mixture of experts is not kept, unless its family is trained")
    parts = (family.layer_part(tensor.name) for tensor in spec.tensors if tensor.name.endswith(".bias"))
    names = {part[1] for part in parts if part is not None}
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
        "layer_types": _kinds(spec),
        "not_in_gguf": spec.not_in_gguf or spec.text_not_in_gguf,
        **({"per_layer_config": own} if own else {}),
        **dict(spec.fields),
    }


def _kinds(spec: ModelSpec) -> list[str]:
    """Return transformers' name of the kind of each layer."""
    if spec.recurrent:
        return [FULL if width else RECURRENT for width in spec.kv_widths]
    return [SLIDING if layer in spec.windowed else FULL for layer in range(spec.layers)]


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
    whole = WHOLE_FAMILIES.get(config["model_type"])
    further = tuple(config[name] for name in whole.fields) if whole else ()
    return (*_ALIKE(config), own, further), (*_SIZES(config), full, config["num_hidden_layers"] - full)


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
    used = value_of(config, "use_sliding_window", bool(kinds) or not family.late_windows)
    if not window or not used:
        return 0, ()
    period = config.get("sliding_window_pattern") or period
    if kinds:
        windowed = [layer for layer, kind in enumerate(kinds[:layers]) if kind == SLIDING]
    elif family.late_windows:
        windowed = list(range(value_of(config, "max_window_layers", _MAX_WINDOW_LAYERS), layers))
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
        widths[layer] = size_of(own, FFN)
    return tuple(widths)


def _with_widths(spec: ModelSpec, widths: tuple[int, ...]) -> ModelSpec:
    """Return a description with these FFN widths, one for each layer, without its tensors."""
    alike = len(set(widths)) == 1
    return replace(spec, ffn_width=max(widths), ffn_widths=() if alike else widths)


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

    Raises:
        InputError: The family is trained whole, and more than the vocabulary would change.
    """
    if spec.architecture in WHOLE_FAMILIES:
        if layers is not None or set(sizes) - {"vocabulary"}:
            get_family(spec.architecture)  # raises
        tables = ("vocab_size", *WHOLE_FAMILIES[spec.architecture].vocabularies)
        changed = spec_from_config(config_of(spec) | dict.fromkeys(tables, sizes.get("vocabulary", spec.vocabulary)))
        known = ("not_in_gguf", "text_not_in_gguf", "process_bytes")
        return replace(changed, **{name: getattr(spec, name) for name in known})
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
