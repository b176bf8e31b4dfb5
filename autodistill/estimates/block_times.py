"""Times of a model's blocks by storage type, measured on this machine. Their sums predict whole models."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.estimates.activations import window_in
from autodistill.estimates.speed import PROMPT_TOKENS
from autodistill.hardware.budget import Budget, DeviceBudget, LatencyLimit
from autodistill.hardware.machine import cores
from autodistill.models.config import config_of
from autodistill.models.families import FAMILIES, Axis, get_family
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.quantization.formats import TYPES
from autodistill.strategy.deployment import Deployment
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json, write_json

ATTENTION, FFN_IN, FFN_OUT, HEAD = "attention", "ffn_in", "ffn_out", "head"
"""Parts of a model: attention matrices, matrices that an FFN begins with, the one that ends it, and the output head."""

PARTS = (ATTENTION, FFN_IN, FFN_OUT, HEAD)
METHOD = 1
"""Version of the measuring method; raise it with each change of the method."""

# Fields of the config in which models of one table may differ.
_SIZES = ("num_hidden_layers", "intermediate_size", "layer_types", "per_layer_config", "not_in_gguf")
_MARGIN = 0.03  # share of an FFN's time that a width must exceed to count as slow
_KINDS = {storage: kind for kind, storage in TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Time:
    """A measured time in seconds. The spread is half of the distance between the shortest and the longest round."""

    seconds: float
    spread: float

    def to_json(self) -> dict[str, float]:
        """Return the time as plain data."""
        return {"seconds": self.seconds, "spread": self.spread}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The times of a pass through a model, by part: of one token after others, or of a prompt.

    Attributes:
        tokens: Number of tokens before the token, or in the prompt.
        constant: Time that does not depend on how the model is stored.
        parts: By part and type, the time of one layer, or of the head, wholly in that type. Attention includes
            everything in a layer except the FFN's matrices.
        cache: By type of keys and values, the time of a layer in excess of f16.
        each: By type of keys and values, the time of a layer for each token beyond `tokens`.
        slow: The 95th percentile divided by the median.
    """

    tokens: int
    constant: Time
    parts: Mapping[str, Mapping[str, Time]]
    cache: Mapping[str, Time]
    each: Mapping[str, Time]
    slow: float

    def to_json(self) -> dict[str, Any]:
        """Return the times as plain data."""
        named = {"cache": self.cache, "each": self.each, **self.parts}
        times = {name: {kind: one.to_json() for kind, one in found.items()} for name, found in named.items()}
        return {"tokens": self.tokens, "slow": self.slow, "constant": self.constant.to_json(), **times}


@dataclass(frozen=True, kw_only=True)
class Width:
    """The excess time of an FFN width, as a share of the time expected from widths that are multiples of 256 neurons.

    The expected time lies between those of a wider and a narrower FFN.

    Attributes:
        neurons, kind: The width, and the type of all its matrices.
        decode, prompt: The excess for one token, and for a prompt.
        decode_spread, prompt_spread: Half of the distance between rounds of measuring.
    """

    neurons: int
    kind: str
    decode: float
    decode_spread: float
    prompt: float
    prompt_spread: float

    @property
    def multiple(self) -> int:
        """The largest power of two that divides the width."""
        return self.neurons & -self.neurons

    @property
    def slow(self) -> bool:
        """Whether the width is slower than expected by more than 3%, and by more than rounds differ."""
        return self.decode > max(_MARGIN, self.decode_spread) or self.prompt > max(_MARGIN, self.prompt_spread)


def liked_multiple(widths: Sequence[Width]) -> int | None:
    """Return the smallest multiple of neurons from which on no width is slow, or None if no width was timed."""
    if not widths:
        return None
    return 2 * max((one.multiple for one in widths if one.slow), default=min(one.multiple for one in widths) // 2)


@dataclass(frozen=True, kw_only=True)
class BlockTimes:
    """The times of blocks for models of the same dimensions, with any number of layers and any FFN widths.

    Attributes:
        key: Device, runtime and its version, threads, context and dimensions.
        weights: Number of weights of one layer, or of the head, by part.
        decode, prompt: The times of a token after others, and of a prompt.
        widths: The excess times of FFNs whose widths are odd multiples of some number of neurons.
        layers: Number of layers of the models that were timed.
        doubts: Why the times are doubtful; empty if the machine was quiet.
        time: When they were measured, in ISO 8601.
    """

    key: Mapping[str, Any]
    weights: Mapping[str, int]
    decode: Pass
    prompt: Pass
    widths: tuple[Width, ...]
    layers: int
    doubts: tuple[str, ...]
    time: str

    @property
    def name(self) -> str:
        """The source of a prediction, in words: the device and the day of the timing."""
        doubtful = f", doubtful: {self.doubts[0]}" if self.doubts else ""
        return f"blocks timed on {self.key['device']}, {self.time[:10]}{doubtful}"

    def limit_seconds(
        self, spec: ModelSpec, deployment: Deployment, limit: LatencyLimit, *, context: int
    ) -> float | None:
        """Return the predicted seconds that are compared with a limit, or None if the table does not cover it.

        The table does not cover several streams, types that were not timed, students with fewer heads, and other
        contexts and runtimes. For a percentile above the median, the median is multiplied by the ratio of the 95th
        percentile to the median.
        """
        if self.key["shape"]["num_key_value_heads"] != spec.kv_heads:
            return None
        if limit.streams > 1 or context != self.key["context"] or deployment.runtime != self.key["runtime"]:
            return None
        one = self.decode if limit.quantity == "tpot" else self.prompt
        found = self.seconds(spec, deployment, one, context if limit.quantity == "tpot" else one.tokens)
        return None if found is None else found * (one.slow if limit.percentile > 50 else 1.0)

    def seconds(self, spec: ModelSpec, deployment: Deployment, one: Pass, behind: int) -> float | None:
        """Return the typical seconds of a pass after `behind` tokens, or None if a type was not timed."""
        total = one.constant.seconds
        for part, kind, weights in _stored(spec, deployment):
            if kind not in one.parts[part]:
                return None
            total += one.parts[part][kind].seconds * weights / self.weights[part]
        window, narrow = window_in(spec, deployment.runtime)
        for kind in deployment.cache_types:
            if kind not in one.cache:
                return None
            beyond = (spec.layers - narrow) * max(0, behind - one.tokens)
            beyond += narrow * max(0, min(behind, window) - one.tokens)
            total += (spec.layers * one.cache[kind].seconds + beyond * one.each[kind].seconds) / 2
        return total

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return {
            "key": dict(self.key),
            "weights": dict(self.weights),
            "decode": self.decode.to_json(),
            "prompt": self.prompt.to_json(),
            "widths": [vars(one) for one in self.widths],
            "layers": self.layers,
            "doubts": list(self.doubts),
            "time": self.time,
        }


def part_of(spec: ModelSpec, name: str, role: Role) -> str | None:
    """Return the part of a model that a tensor belongs to, or None if no pass multiplies by the tensor."""
    if role is Role.HEAD or (role is Role.EMBEDDING and spec.tied):
        return HEAD
    if role is not Role.LINEAR:
        return None
    outputs, inputs = get_family(spec.architecture).axes(name)
    return FFN_IN if outputs is Axis.FFN else FFN_OUT if inputs is Axis.FFN else ATTENTION


def part_weights(spec: ModelSpec) -> dict[str, int]:
    """Return the number of weights in the first layer and in the head, by part."""
    family, found = get_family(spec.architecture), dict.fromkeys(PARTS, 0)
    for tensor in spec.tensors:
        place = family.layer_part(tensor.name)
        if (part := part_of(spec, tensor.name, tensor.role)) and (place is None or place[0] == 0):
            found[part] += math.prod(tensor.shape)
    return found


def _stored(spec: ModelSpec, deployment: Deployment) -> Iterator[tuple[str, str, int]]:
    """Yield the part, the type and the number of weights of each matrix."""
    for tensor in spec.tensors:
        if part := part_of(spec, tensor.name, tensor.role):
            yield part, _KINDS.get(deployment.storage(tensor), ""), math.prod(tensor.shape)


def runtime_version() -> str | None:
    """Return the version of the llama.cpp package on this machine, or None if it is not installed."""
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return None


def key_of(device: str, spec: ModelSpec, context: int, threads: int) -> dict[str, Any]:
    """Return the key of a table: models with the same key have the same times."""
    shape = {name: value for name, value in config_of(spec).items() if name not in _SIZES}
    return {
        "method": METHOD,
        "device": device,
        "runtime": "llama.cpp",
        "version": runtime_version(),
        "threads": threads,
        "context": context,
        "prompt": min(PROMPT_TOKENS, context),
        "shape": shape,
    }


def times_file(cache: Path, key: Mapping[str, Any]) -> Path:
    """Return the path of a table, next to what was measured of the device itself."""
    return cache / "devices" / f"blocks-{content_hash(dict(key))}.json"


def keep_times(cache: Path, times: BlockTimes) -> Path:
    """Write a table and return its path."""
    path = times_file(cache, times.key)
    write_json(path, times.to_json())
    return path


def kept_times(cache: Path, device: str, spec: ModelSpec, context: int) -> BlockTimes | None:
    """Return the table of a device for a model's dimensions, or None if nothing was timed.

    Raises:
        InputError: The file is damaged, or holds other blocks' times.
    """
    if spec.architecture not in FAMILIES or spec.experts or spec.latent:
        return None
    key = key_of(device, spec, context, cores())
    path = times_file(cache, key)
    return read_times(path, key) if path.is_file() else None


def times_within(cache: Path, budget: Budget, spec: ModelSpec) -> BlockTimes | None:
    """Return the table of a budget's device if the budget limits latency and the table was made; otherwise None.

    Raises:
        InputError: As `kept_times`.
    """
    if not isinstance(budget, DeviceBudget) or not budget.latency:
        return None
    return kept_times(cache, budget.device.name, spec, budget.context)


def read_times(path: Path, key: Mapping[str, Any]) -> BlockTimes:
    """Read the table with the key `key`.

    Raises:
        InputError: The file is damaged, or holds other blocks' times.
    """
    remedy = "remove it, and time them again with autodistill measure MODEL --blocks"
    try:
        data = read_json(path)
        told = data["key"]
        found = BlockTimes(
            key=told,
            weights={part: _count(data["weights"][part]) for part in PARTS},
            decode=_pass(data["decode"]),
            prompt=_pass(data["prompt"]),
            widths=tuple(map(_width, data["widths"])),
            layers=_count(data["layers"]),
            doubts=tuple(map(str, data["doubts"])),
            time=str(data["time"]),
        )
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} holds no whole times of blocks ({error}): {remedy}") from None
    if told != dict(key):
        wrong = ", ".join(name for name in key if not isinstance(told, Mapping) or told.get(name) != key[name])
        raise InputError(f"{path} holds times of other blocks (another {wrong}): {remedy}")
    return found


def _pass(data: Mapping[str, Any]) -> Pass:
    return Pass(
        tokens=_count(data["tokens"]),
        constant=_time(data["constant"]),
        parts={part: {kind: _time(one) for kind, one in data[part].items()} for part in PARTS},
        cache={kind: _time(one) for kind, one in data["cache"].items()},
        each={kind: _time(one) for kind, one in data["each"].items()},
        slow=_number(data["slow"]),
    )


def _width(data: Mapping[str, Any]) -> Width:
    shares = ("decode", "decode_spread", "prompt", "prompt_spread")
    return Width(
        neurons=_count(data["neurons"]), kind=str(data["kind"]), **{name: _number(data[name]) for name in shares}
    )


def _time(data: Mapping[str, Any]) -> Time:
    return Time(seconds=_number(data["seconds"]), spread=_number(data["spread"]))


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no count")
    return value
