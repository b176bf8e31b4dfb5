"""A model described by its config, and held against a budget; no torch, no training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal

from autodistill.budget import DeviceBudget, on_gpu
from autodistill.config_fields import check_config
from autodistill.contracts import MOST_LAYERS, MOST_OF_A_SIZE, ModelSpec
from autodistill.errors import InputError
from autodistill.families import FAMILIES, Axis, get_family
from autodistill.formats import Packing
from autodistill.gguf_graphs import FULL, SLIDING, cannot_run, not_computed
from autodistill.grids import Grid
from autodistill.roofline import limit_seconds
from autodistill.serving_memory import MemoryEstimate, memory
from autodistill.strategy import Deployment
from autodistill.tensors import Entry, Layout, Tensors
from autodistill.units import Budget, LatencyLimit, format_bytes, format_duration

ARCHITECTURES = tuple(FAMILIES)
"""transformers' `model_type`s that can be described."""
_MAX_WINDOW_LAYERS = 28  # transformers' own default for the families that have the field


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """Describes a model by its transformers config, without loading it.

    Names and shapes are those of transformers' own modules for the architecture.

    Args:
        config: Content of `config.json`, or a config's `to_dict()`.

    Raises:
        InputError: An architecture that is not supported, or something it can do that is not; a size that is missing
            or no positive number, or heads that do not divide what they should; or as `check_config`.
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
        ffn_width=_size(config, "intermediate_size"),
        vocabulary=_size(config, "vocab_size"),
        max_context=_size(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        tensors=(),
    )
    window, windowed = _windows(config, spec.layers)
    spec = replace(spec, window=window, windowed=windowed, not_in_gguf=_not_in_gguf(config, spec))
    fields = tuple((name, bool(config.get(name, default))) for name, default in family.conditions)
    kinds, layout = _layout(architecture, spec.layers, spec.tied, fields)
    lengths = _lengths(spec)
    return replace(spec, tensors=Tensors(layout, [tuple(lengths[axis] for axis in axes) for axes in kinds]))


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """The least config that `spec_from_config` describes a model of a family by: what a row keeps of its student.

    Raises:
        InputError: A mixture of experts, which no family describes.
    """
    get_family(spec.architecture)
    if spec.experts:
        raise InputError("the shape of a mixture of experts is not kept")
    names = {name.rpartition(".layers.0.")[2] for tensor in spec.tensors if (name := tensor.name).endswith(".bias")}
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
    }


_SIZES = itemgetter(
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size"),
)
_ALIKE = itemgetter(
    *("model_type", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window"),
)


def comparable(config: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """What two models must have in common to be compared by size, and their sizes.

    Of two that are packed alike, one that is no smaller in any size takes no less memory, and no less time, under any
    load on any device: if the rows of both are `in_blocks` alike. Else a narrower model of K-quants, whose rows are on
    the grid that stands in for theirs, may take more bytes and more time than a wider one, so that whoever passes over
    a model by its sizes compares that too.

    Args:
        config: As `config_of` gives it.
    """
    full = config["layer_types"].count(FULL)
    return _ALIKE(config), (*_SIZES(config), full, config["num_hidden_layers"] - full)


def in_blocks(config: Mapping[str, Any], packing: Packing) -> tuple[bool, ...]:
    """Of each length of rows that a model's matrices have, whether super-blocks divide it; nothing without those.

    Args:
        config: As `config_of` gives it.
        packing: What the model is packed in.
    """
    grid = packing.linear
    if not isinstance(grid, Grid) or not grid.fallback:
        return ()
    queries = config["num_attention_heads"] * config["head_dim"]
    return tuple(grid.divides(length) for length in (config["hidden_size"], config["intermediate_size"], queries))


def _not_in_gguf(config: Mapping[str, Any], spec: ModelSpec) -> str:
    """As `not_computed` of a model's config; what a row keeps of a model holds the answer."""
    known = config.get("not_in_gguf")
    return not_computed(config, spec.head_dim) if known is None else str(known)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, tuple[int, ...]]:
    """The sliding window of a config, and the layers that have one, as transformers has them."""
    family, kinds = get_family(str(config["model_type"])), config.get("layer_types")
    usual, period = family.windows
    window = config.get("sliding_window", usual)
    # What a row keeps of a model tells layers apart, and has no switch.
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
    """The kinds of axes that tensors run along, and the tensors by them; common to all other sizes."""
    family, kinds, found = get_family(architecture), dict[tuple[Axis, ...], int](), []
    for name, role in family.tensors(dict(fields), layers, tied):
        index = kinds.setdefault(family.axes(name), len(kinds))
        found.append(Entry(name, role, family.more_bits(name, layers, tied), index))
    return tuple(kinds), Layout(found)


def resized(spec: ModelSpec, layers: Sequence[int] | None = None, **sizes: int | str) -> ModelSpec:
    """The same model with other sizes.

    Args:
        spec: The model.
        layers: Which of its layers are kept; all by default.
        sizes: The fields of the description that differ, `layers` apart.
    """
    kept = range(spec.layers) if layers is None else layers
    windowed = tuple(new for new, old in enumerate(kept) if old in set(spec.windowed))
    changed = replace(spec, layers=len(kept), windowed=windowed, window=spec.window if windowed else 0)
    changed = replace(changed, **sizes)  # type: ignore[arg-type]
    family, lengths = get_family(spec.architecture), _lengths(changed)
    tensors = (
        replace(
            tensor,
            shape=tuple(lengths[axis] for axis in family.axes(tensor.name)),
            more_bits=family.more_bits(tensor.name, changed.layers, changed.tied),
        )
        for tensor in spec.tensors
        if (part := family.layer_part(tensor.name)) is None or part[0] < changed.layers
    )
    return replace(changed, tensors=tuple(tensors))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How one deployment stands to a budget.

    Attributes:
        deployment: Which one.
        estimate: Its memory by parts.
        need, limit: Bytes.
        slack: The largest log(need / limit) of memory and latencies: it fits at 0 and below.
        late: Of each limit of latency that is broken, what it is predicted to take and the limit, in words.
    """

    deployment: Deployment
    estimate: MemoryEstimate
    need: int
    limit: int
    slack: float
    late: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A limit that something does not keep to.

    Attributes:
        limit: Of which kind.
        slack: log(need / limit), above 0.
        said: What it misses the limit by, in one line.
    """

    limit: Literal["memory", "latency", "training memory"]
    slack: float
    said: str


def latencies(spec: ModelSpec, deployment: Deployment, budget: Budget) -> dict[LatencyLimit, float]:
    """Seconds that are predicted for each limit of latency that a budget has."""
    if not isinstance(budget, DeviceBudget):
        return {}
    return {
        limit: limit_seconds(spec, deployment, budget.device, limit, context=budget.context) for limit in budget.latency
    }


def too_late(seconds: Mapping[LatencyLimit, float], source: str) -> tuple[str, ...]:
    """In words, each limit of latency that is broken.

    Args:
        seconds: What each takes.
        source: How that is known: "predicted" or "measured".
    """
    return tuple(
        f"latency: {limit.name} is {source} {format_duration(found)}, over {format_duration(limit.seconds)}"
        for limit, found in seconds.items()
        if found > limit.seconds
    )


def fits(spec: ModelSpec, deployments: Sequence[Deployment], budget: Budget) -> tuple[Fit, ...]:
    """Holds each deployment against the budget's memory, and against its latencies where it has a device.

    Raises:
        InputError: As `memory`.
    """
    found = []
    for deployment in deployments:
        estimate = memory(spec, deployment, context=budget.context, batch=budget.batch, on_gpu=on_gpu(budget))
        times = latencies(spec, deployment, budget)
        ratios = [estimate.total_bytes / budget.memory_bytes, *(taken / one.seconds for one, taken in times.items())]
        found.append(
            Fit(
                deployment=deployment,
                estimate=estimate,
                need=estimate.total_bytes,
                limit=budget.memory_bytes,
                slack=math.log(max(ratios)),
                late=too_late(times, "predicted"),
            )
        )
    return tuple(found)


def smallest(fitting: Sequence[Fit]) -> Fit:
    """The one that is nearest to the budget, or furthest within it, the first of equals."""
    return min(fitting, key=lambda fit: fit.slack)


def nearest_miss(fitting: Sequence[Fit], budget: Budget) -> Miss | None:
    """Why nothing fits: what that misses which is nearest to the budget, or None where something fits."""
    fit = smallest(fitting)
    if fit.slack <= 0:
        return None
    at = f"context {budget.context}" + (f" and batch {budget.batch}" if budget.batch > 1 else "")
    if fit.late and isinstance(budget, DeviceBudget):
        said = f"the nearest, {fit.deployment.name}, is too slow for {budget.device.name}: {'; '.join(fit.late)}"
        return Miss(limit="latency", slack=fit.slack, said=said)
    said = (
        f"the smallest, {fit.deployment.name}, needs {format_bytes(fit.need)} at {at}, "
        f"{format_bytes(fit.need - fit.limit)} over the {format_bytes(fit.limit)} budget"
    )
    return Miss(limit="memory", slack=fit.slack, said=said)


def check_holds(spec: ModelSpec, packing: Packing) -> None:
    """Refuses a packing that cannot hold a model, whatever memory it needs.

    Raises:
        InputError: What llama.cpp would not compute of it, or as `Packing.check_model`.
    """
    if packing.container == "gguf" and (reason := cannot_run(spec)):
        raise InputError(f"GGUF cannot hold this {spec.architecture}: {reason}")
    packing.check_model(spec.tensors)


def holdable(spec: ModelSpec, deployments: Iterable[Deployment]) -> tuple[Deployment, ...]:
    """Those deployments that can hold a model, whatever memory they need."""
    return tuple(deployment for deployment in deployments if not cannot_hold(spec, deployment))


def cannot_hold(spec: ModelSpec, deployment: Deployment) -> str:
    """Why a deployment cannot hold a model, or nothing where it can."""
    try:
        check_holds(spec, deployment)
    except InputError as error:
        return str(error)
    return ""
