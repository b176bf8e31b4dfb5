"""Time small models in llama.cpp, in rounds, and compute the times of blocks from them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.advisor.blocks.differences import blocks_of, pass_of, widths_of
from autodistill.advisor.blocks.small_models import Model, SmallModel, models_of, write_model
from autodistill.errors import InputError
from autodistill.estimates.block_times import BlockTimes, key_of, part_weights
from autodistill.hardware.background_load import Watch
from autodistill.hardware.machine import cores, detect, machine_name
from autodistill.models.llama_cpp_graphs import cannot_run
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import TYPES
from autodistill.runtimes.llama_cpp import LlamaServer

ROUNDS = 3
_CHUNKS, _STEPS, _WARM = 6, 8, 2  # chunks, in turn with the reference's; timed tokens and warm-up tokens of a chunk


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
    """Time blocks with a model's dimensions on this machine.

    Small models with some of its layers are timed. Each differs from a reference in 8 bits in one thing: half of the
    layers, half of the FFN, an eighth of the vocabulary; one part or all parts in another type; the cache in another
    type. A block's time is the difference of two models' times, so that constant time cancels. Each round times all
    models, and their tokens alternate with the reference's. So it does not matter if the machine becomes slower.

    Args:
        spec: The model.
        name: Name of the model for a person.
        context: Tokens of context.
        rounds: How often each model is timed.
        notify: Called with lines about progress.
        kinds: Types that are timed in addition to the reference's.
        threads: CPU threads of llama.cpp. 0 uses all cores, as limits of latency assume.
        clock: Times a prompt and the tokens after it. By default, llama.cpp's own clock.

    Raises:
        InputError: llama.cpp does not run the model, or no such small models can be made of it.
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


class Clock:
    """Times a prompt, and tokens after it, by llama.cpp's own clock."""

    def prompt(self, server: LlamaServer, ids: list[int]) -> float:
        """Return the seconds that reading a prompt takes."""
        return server.begin([ids])

    def tokens(self, server: LlamaServer, count: int) -> list[float]:
        """Return the seconds of each token after the prompt. All are decoded at the same position."""
        return [server.step(grow=False) for _ in range(count)]


@dataclass(kw_only=True)
class _Timed:
    """The times of one round.

    Attributes:
        decode: Each model's time of a token, divided by that of the reference, which is timed in turn with it.
        prompt: Each model's seconds of a prompt.
        reference: Seconds of the reference's tokens.
        scattered: Each token's time, divided by the median of its chunk.
        used: CPU seconds of llama.cpp.
    """

    decode: dict[Model, float] = field(default_factory=dict)
    prompt: dict[Model, float] = field(default_factory=dict)
    reference: list[float] = field(default_factory=list)
    scattered: list[float] = field(default_factory=list)
    used: float = 0.0


def _timed(folder: Path, small: Mapping[Model, SmallModel], key: Mapping[str, Any], clock: Clock) -> _Timed:
    """Time each small model once: a prompt and tokens after it. For `far` ones, also time tokens at a full context."""
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
        context: Tokens of context.
        threads: CPU threads.
        keys, values: Types of the cache. Without `values`, both have the type of the keys.
    """
    return LlamaServer(path, context + 1, threads, cache_type_k=keys, cache_type_v=values or keys, whole_cache=True)


def _in_turn(server: LlamaServer, beside: LlamaServer, clock: Clock, found: _Timed) -> float:
    """Return the ratio of a server's token time to the reference's. Chunks of both are timed in turn."""
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
