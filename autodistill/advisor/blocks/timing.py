"""Timing of small models in llama.cpp, in rounds, and what blocks take by them."""

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
_CHUNKS, _STEPS, _WARM = 6, 8, 2  # of tokens, in turn with those of the reference; the warm ones do not count


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
    """The times of one round.

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


def _timed(folder: Path, small: Mapping[Model, SmallModel], key: Mapping[str, Any], clock: Clock) -> _Timed:
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
