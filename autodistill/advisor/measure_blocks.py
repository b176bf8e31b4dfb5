"""Blocks of a model's dimensions, timed in llama.cpp: they are differences of small models of random weights."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, LlamaFileType, TokenType

from autodistill.errors import InputError
from autodistill.estimates.block_times import (
    ATTENTION,
    FFN_IN,
    FFN_OUT,
    HEAD,
    PARTS,
    BlockTimes,
    Pass,
    Time,
    Width,
    key_of,
    part_of,
    part_weights,
)
from autodistill.estimates.serving_memory import check_cache
from autodistill.export.gguf import KINDS, add_metadata
from autodistill.hardware.background_load import Watch
from autodistill.hardware.machine import cores, detect, machine_name
from autodistill.models.config import config_of, resized
from autodistill.models.families import get_family
from autodistill.models.llama_cpp_graphs import cannot_run, graph_of
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.quantization.formats import CACHE_BYTES, TYPES, tensor_bytes
from autodistill.quantization.grids import Grid, Storage
from autodistill.quantization.packing import pack
from autodistill.runtimes.llama_cpp import LlamaServer

ROUNDS = 3
_REFERENCE = "q8_0"  # from which all others differ in one thing
_WEIGHTS = 96 * 2**20  # of all layers that are timed: more than any cache of a processor holds, and no more than needed
_CHUNKS, _STEPS, _WARM = 6, 8, 2  # of tokens, in turn with those of the reference; the warm ones do not count
_TILE = 32  # rows of random weights that a matrix repeats
_SCANNED = (_REFERENCE, "q4_0")  # types whose FFNs are timed in odd widths
_ODD = (32, 64, 128)
_COARSE = 256  # neurons of which the others are odd multiples

Model: TypeAlias = tuple[str, ...]
"""What a small model is called: what it differs from the reference in."""


@dataclass(frozen=True, kw_only=True)
class _Small:
    """A small model: its shape, the types of its parts and of its cache, and whether it is timed far behind too."""

    spec: ModelSpec
    kinds: Mapping[str, str] = field(default_factory=dict)
    cache: str = "f16"
    far: bool = False

    def kind(self, name: str, role: Role, columns: int) -> str:
        """Return the type of a matrix: where a type's blocks do not divide its rows the reference's."""
        part = part_of(self.spec, name, role)
        kind = self.kinds.get(part or HEAD, _REFERENCE)
        return kind if _divides(kind, columns) else _REFERENCE


def _divides(kind: str, columns: int) -> bool:
    stored = TYPES[kind]
    return not isinstance(stored, Grid) or stored.divides(columns)


def time_blocks(
    spec: ModelSpec,
    name: str,
    context: int,
    rounds: int = ROUNDS,
    notify: Callable[[str], None] = lambda _: None,
    *,
    kinds: Collection[str] = tuple(TYPES),
    threads: int = 0,
    clock: Clock | None = None,
) -> BlockTimes:
    """Times the blocks of a model's dimensions on this machine.

    Small models with some of its layers are timed, which differ from one in 8 bits in one thing each: half of the
    layers, half of the FFN, an eighth of the vocabulary; one part or all in another type; the cache in another. What a
    block takes is a difference of two, so that what is constant falls out. Each round times all of them, tokens in turn
    with those of that one, so that it does not matter if the machine becomes slower meanwhile.

    Args:
        spec: The model.
        name: What a person calls it.
        context: Tokens of context.
        rounds: How often each is timed.
        notify: Told of what is done.
        kinds: Types that are timed, beside the reference.
        threads: Of llama.cpp; 0 for all cores, of which limits of latency are.
        clock: How a prompt and tokens after it are timed; by llama.cpp's clock unless something else is given.

    Raises:
        InputError: A model that llama.cpp does not run, or of which no such models can be made.
        VerificationError: llama.cpp fails.
    """
    if spec.experts or spec.latent:
        raise InputError(f"{name} is a mixture of experts or has latent attention, whose blocks are not timed")
    if spec.ffn_widths:
        raise InputError(f"the layers of {name} differ in width: time the blocks of the model that it was cut from")
    if reason := cannot_run(spec):
        raise InputError(f"{name} has no blocks that llama.cpp runs: {reason}")
    small = models_of(spec, kinds)
    key = key_of(machine_name(detect()), spec, context, threads or cores())
    used = 0.0
    with (
        tempfile.TemporaryDirectory(prefix="autodistill-blocks-") as folder,
        Watch(key["threads"], lambda: used + time.process_time()) as watch,
    ):
        turns = []
        for turn in range(rounds):
            notify(f"timing {len(small)} small models of {name}'s dimensions, round {turn + 1} of {rounds}")
            turns.append(_timed(Path(folder), small, key, clock or Clock()))
            used += turns[-1].used
    unit = float(np.median([step for turn in turns for step in turn.reference]))
    found = {
        "decode": [{model: unit * ratio for model, ratio in turn.decode.items()} for turn in turns],
        "prompt": [turn.prompt for turn in turns],
    }
    medians = {model: float(np.median([turn.prompt[model] for turn in turns])) for model in small}
    scattered = {
        "decode": [step for turn in turns for step in turn.scattered],
        "prompt": [turn.prompt[model] / median for model, median in medians.items() for turn in turns],
    }
    layers, weights = small["reference",].spec.layers, part_weights(spec)
    passes = {
        phase: pass_of(
            [blocks_of(one, small, context - key["prompt"]) for one in times],
            key["prompt"],
            float(np.percentile(scattered[phase], 95)),
        )
        for phase, times in found.items()
    }
    return BlockTimes(
        key=key,
        weights=weights,
        decode=passes["decode"],
        prompt=passes["prompt"],
        widths=widths_of(small, found["decode"], found["prompt"]),
        layers=layers,
        doubts=watch.noise.doubts,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def models_of(spec: ModelSpec, kinds: Collection[str] = tuple(TYPES)) -> dict[Model, _Small]:
    """Return the small models that are timed, by what they differ from the reference in.

    Args:
        spec: The model.
        kinds: Types that are timed, beside the reference.

    Raises:
        InputError: The dimensions are too small to be halved.
    """
    count = sum(count for part, count in part_weights(spec).items() if part != HEAD)
    layers = min(spec.layers, max(2, math.ceil(_WEIGHTS / count)))
    if layers < 2 or spec.ffn_width < 64 or spec.vocabulary < 64:
        raise InputError("blocks are timed of models of at least 2 layers, 64 neurons and a vocabulary of 64")
    whole = resized(spec, range(layers), ffn_width=spec.ffn_width)
    reference = _Small(spec=whole, far=True)
    half = max(32, spec.ffn_width // 2 // 32 * 32)
    found: dict[Model, _Small] = {
        ("reference",): reference,
        ("half of the layers",): replace(reference, spec=resized(whole, range(layers // 2)), far=False),
        ("half of the FFN",): replace(reference, spec=resized(whole, ffn_width=half), far=False),
        ("part of the vocabulary",): replace(
            reference, spec=resized(whole, vocabulary=max(32, spec.vocabulary // 8)), far=False
        ),
    }
    again = replace(reference, far=False)
    for part in PARTS:
        columns = {one.shape[1] for one in whole.tensors if part_of(whole, one.name, one.role) == part}
        for kind in kinds:
            if kind != _REFERENCE and any(_divides(kind, one) for one in columns):
                found[part, kind] = replace(again, kinds={part: kind})
                found["all", kind] = replace(again, kinds=dict.fromkeys(PARTS, kind))
    # Where a process lies in memory changes its times by some percent: that from which all differ is loaded thrice.
    found["again", "first"] = again
    for kind in CACHE_BYTES:
        if kind != "f16" and _holds(spec, kind):
            found["cache", kind] = replace(reference, cache=kind)
    base = (spec.ffn_width - 1) // _COARSE * _COARSE
    low = base - _COARSE
    for kind in (one for one in _SCANNED if low > 0 and (one == _REFERENCE or one in kinds)):
        for width in (low, *(low + odd for odd in _ODD), base):
            narrow = resized(whole, ffn_width=width)
            found["width", str(width), kind] = _Small(spec=narrow, kinds={FFN_IN: kind, FFN_OUT: kind})
    return found | {("again", "second"): again}


def _holds(spec: ModelSpec, kind: str) -> bool:
    try:
        check_cache(spec, "llama.cpp", (kind, kind))
    except InputError:
        return False
    return True


_SAME: tuple[Model, ...] = (("reference",), ("again", "first"), ("again", "second"))


def blocks_of(times: Mapping[Model, float], small: Mapping[Model, _Small], beyond: int) -> dict[Model, float]:
    """Return the seconds of each block, from those of the small models of one round.

    Args:
        times: Of a pass through each.
        small: The models, which have the differences.
        beyond: Tokens that those which were timed far behind have before them, more than the others.
    """
    reference = small["reference",].spec
    layers = reference.layers
    here = float(np.mean([seconds for model, seconds in times.items() if model in _SAME]))
    fewer = small["half of the layers",].spec.layers
    layer = (here - times["half of the layers",]) / (layers - fewer)
    width = small["half of the FFN",].spec.ffn_width
    ffn = (here - times["half of the FFN",]) / layers * reference.ffn_width / (reference.ffn_width - width)
    entries = small["part of the vocabulary",].spec.vocabulary
    head = (here - times["part of the vocabulary",]) * reference.vocabulary / (reference.vocabulary - entries)
    weights = part_weights(reference)
    share = weights[FFN_IN] / (weights[FFN_IN] + weights[FFN_OUT])
    whole = {ATTENTION: layer - ffn, FFN_IN: share * ffn, FFN_OUT: (1 - share) * ffn, HEAD: head}
    found: dict[Model, float] = {("constant",): here - layers * layer - head}
    found |= {(part, _REFERENCE): seconds for part, seconds in whole.items()}
    found |= {("cache", "f16"): 0.0, ("each", "f16"): _each(times, ("reference",), layers, beyond)}
    changes = _changes(times, here)
    for model, one in small.items():
        if model[0] in PARTS:
            part, kind = model
            changed = _changed(one, part, kind) / weights[part]
            found[model] = whole[part] + changes[model] / (1 if part == HEAD else layers) / changed
        elif model[0] == "cache":
            found[model] = (times[model] - here) / layers
            found["each", model[1]] = _each(times, model, layers, beyond)
    return found


def _changes(times: Mapping[Model, float], here: float) -> dict[Model, float]:
    """Return by how much each part in each type changes the time: together as all parts do, by least squares."""
    found = {model: seconds - here for model, seconds in times.items() if model[0] in PARTS}
    for _, kind in [model for model in times if model[0] == "all"]:
        parts = [model for model in found if model[1] == kind]
        rest = times["all", kind] - here - sum(found[model] for model in parts)
        found |= {model: found[model] + rest / (len(parts) + 1) for model in parts}
    return found


def _each(times: Mapping[Model, float], model: Model, layers: int, beyond: int) -> float:
    """Return what a layer takes for each token further behind; of prompts nothing was timed further behind."""
    far = (*model, "far")
    return (times[far] - times[model]) / layers / beyond if far in times and beyond > 0 else 0.0


def _changed(one: _Small, part: str, kind: str) -> int:
    """Return the weights of a layer, or of the head, that have a type: its blocks may not divide all rows of a part."""
    family, found = get_family(one.spec.architecture), 0
    for tensor in one.spec.tensors:
        place = family.layer_part(tensor.name)
        own = part_of(one.spec, tensor.name, tensor.role) == part and (place is None or place[0] == 0)
        found += math.prod(tensor.shape) if own and _divides(kind, tensor.shape[1]) else 0
    return found


def pass_of(turns: Sequence[Mapping[Model, float]], tokens: int, slow: float) -> Pass:
    """Return the times of blocks from those of all rounds: their medians, and how far they lie apart.

    Args:
        turns: Seconds of each block, of each round.
        tokens: Before the token, or of the prompt.
        slow: The 95th percentile over the median.
    """
    times = {
        block: Time(seconds=float(np.median(seconds)), spread=(max(seconds) - min(seconds)) / 2)
        for block in turns[0]
        for seconds in [[turn[block] for turn in turns]]
    }

    def of(part: str) -> dict[str, Time]:
        return {block[1]: time for block, time in times.items() if block[0] == part}

    return Pass(
        tokens=tokens,
        constant=times["constant",],
        parts={part: of(part) for part in PARTS},
        cache=of("cache"),
        each=of("each"),
        slow=max(1.0, slow),
    )


def widths_of(
    small: Mapping[Model, _Small], decode: Sequence[Mapping[Model, float]], prompt: Sequence[Mapping[Model, float]]
) -> tuple[Width, ...]:
    """Return what FFNs in odd multiples of some neurons take beyond their share of a wider and a narrower one.

    Args:
        small: The models.
        decode, prompt: Seconds of a pass through each, of each round.
    """
    found = []
    for _, width, kind in (model for model in small if model[0] == "width" and int(model[1]) % _COARSE):
        beyond = [[_beyond(one, int(width), kind) for one in turns] for turns in (decode, prompt)]
        spreads = [(max(one) - min(one)) / 2 for one in beyond]
        found.append(
            Width(
                neurons=int(width),
                kind=kind,
                decode=float(np.median(beyond[0])),
                decode_spread=spreads[0],
                prompt=float(np.median(beyond[1])),
                prompt_spread=spreads[1],
            )
        )
    return tuple(found)


def _beyond(times: Mapping[Model, float], width: int, kind: str) -> float:
    """Return what a width takes beyond the line between two coarse ones, as a share of its FFN's time by that line."""
    low = width // _COARSE * _COARSE
    narrow, wide = (times["width", str(one), kind] for one in (low, low + _COARSE))
    slope = (wide - narrow) / _COARSE
    return (times["width", str(width), kind] - narrow - slope * (width - low)) / (slope * width)


class Clock:
    """Times a prompt, and tokens after it, by llama.cpp's own clock."""

    def prompt(self, server: LlamaServer, ids: list[int]) -> float:
        """Return the seconds of reading a prompt."""
        return server.begin([ids])

    def tokens(self, server: LlamaServer, count: int) -> list[float]:
        """Return the seconds of each token after the prompt, all at the same place."""
        return [server.step(grow=False) for _ in range(count)]


@dataclass(kw_only=True)
class _Timed:
    """What a round timed.

    Attributes:
        decode: Of each model the time of a token, over that of the reference in turn with it.
        prompt: Of each the seconds of a prompt.
        reference: Seconds of the reference's tokens.
        scattered: Of each token the time over the median of those at once.
        used: CPU seconds of llama.cpp.
    """

    decode: dict[Model, float] = field(default_factory=dict)
    prompt: dict[Model, float] = field(default_factory=dict)
    reference: list[float] = field(default_factory=list)
    scattered: list[float] = field(default_factory=list)
    used: float = 0.0


def _timed(folder: Path, small: Mapping[Model, _Small], key: Mapping[str, Any], clock: Clock) -> _Timed:
    """Times each small model once: a prompt and tokens after it, and if asked for those at the end of the context."""
    found = _Timed()
    prompt, context = int(key["prompt"]), int(key["context"])
    reference, path = folder / "reference.gguf", folder / "model.gguf"
    write_model(reference, small["reference",])
    with serve(reference, context, int(key["threads"]), "f16") as beside:
        clock.prompt(beside, _ids(prompt, small["reference",].spec))
        for model, one in small.items():
            write_model(path, one)
            with serve(path, context, int(key["threads"]), one.cache) as server:
                clock.prompt(server, _ids(min(32, prompt), one.spec))
                found.prompt[model] = clock.prompt(server, _ids(prompt, one.spec))
                found.decode[model] = _in_turn(server, beside, clock, found)
                if one.far and context > prompt:
                    clock.prompt(server, _ids(context, one.spec))
                    found.decode[(*model, "far")] = _in_turn(server, beside, clock, found)
                found.used += server.used_seconds() - time.process_time()
        found.used += beside.used_seconds() - time.process_time()
    return found


def serve(path: Path, context: int, threads: int, keys: str, values: str = "") -> LlamaServer:
    """Return a model in llama.cpp, for use in a `with` statement.

    Args:
        path: The GGUF file.
        context: Tokens.
        threads: Of the CPU.
        keys, values: Types of the cache; both are alike unless the second is given.
    """
    return LlamaServer(path, context + 1, threads, cache_type_k=keys, cache_type_v=values or keys, whole_cache=True)


def _in_turn(server: LlamaServer, beside: LlamaServer, clock: Clock, found: _Timed) -> float:
    """Return the time of a server's token over that of the reference, each timed in turn some times."""
    ratios = []
    for _ in range(_CHUNKS):
        medians = []
        for one in (beside, server):
            clock.tokens(one, _WARM)
            taken = clock.tokens(one, _STEPS)
            medians.append(float(np.median(taken)))
            if one is beside:
                found.reference += taken
            else:
                found.scattered += [step / medians[-1] for step in taken]
        ratios.append(medians[1] / medians[0])
    return float(np.median(ratios))


def _ids(count: int, spec: ModelSpec) -> list[int]:
    return [7 * index % spec.vocabulary for index in range(count)]


def write_model(path: Path, one: _Small) -> None:
    """Write a small model as a GGUF file; every matrix repeats some rows of random weights.

    Args:
        path: The file.
        one: The model.
    """
    spec, family = one.spec, get_family(one.spec.architecture)
    writer = GGUFWriter(path, graph_of(spec))
    add_metadata(writer, spec, config_of(spec), LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{index}" for index in range(spec.vocabulary)])
    writer.add_token_types([TokenType.NORMAL] * spec.vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(1)
    storages: list[tuple[tuple[int, ...], Storage]] = []
    for tensor in spec.tensors:
        stored: Storage = "f32"
        if len(tensor.shape) > 1:
            stored = TYPES[one.kind(tensor.name, tensor.role, tensor.shape[1])]
        storages.append((tensor.shape, stored))
        dtype = np.dtype(np.float32 if stored == "f32" else np.float16)
        size = tensor_bytes(tensor, stored)
        writer.add_tensor_info(family.gguf_name(tensor.name), tensor.shape, dtype, size, raw_dtype=KINDS[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape, stored in storages:
        writer.write_tensor_data(_weights(shape, stored))
    writer.close()


def _weights(shape: tuple[int, ...], stored: Storage) -> npt.NDArray[Any]:
    """Return packed weights: ones of a vector, of a matrix random rows that repeat."""
    if len(shape) < 2:
        return np.ones(shape, np.float32)
    rows, columns = shape
    tile = _tile(columns, stored)
    return np.resize(tile, (rows, *tile.shape[1:]))


@lru_cache(64)
def _tile(columns: int, stored: Storage) -> npt.NDArray[Any]:
    """Return packed random rows."""
    rows = np.random.default_rng(0).normal(0, columns**-0.5, (_TILE, columns)).astype(np.float32)
    packed: npt.NDArray[Any] = pack(rows, stored)["data"]
    return packed
