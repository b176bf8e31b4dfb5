"""Timing of a served student: first tokens by prompt length, later tokens by number of streams, and disturbances."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from autodistill.errors import InputError
from autodistill.hardware.background_load import Noise, Watch
from autodistill.hardware.budget import LatencyLimit
from autodistill.hardware.machine import detect, machine_name
from autodistill.hardware.runtime import further_runtime, further_runtimes
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.runtimes.python_server import RUNTIMES, PythonServer
from autodistill.units import count_of

# Largest spread of the medians of rounds, relative to their median, at which figures are not doubted.
_SPREAD = 0.15
_WARM_STEPS = 4
T = TypeVar("T")


class Server(Protocol):
    """What timing needs of a student in its runtime."""

    @property
    def accelerated(self) -> bool:
        """Whether a GPU runs the model."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...

    def begin(self, prompts: Sequence[Sequence[int]]) -> float:
        """Return the seconds until each prompt has its first token."""
        ...

    def step(self) -> float:
        """Return the seconds of one more token in each stream."""
        ...

    def used_seconds(self) -> float:
        """Return the CPU seconds used so far."""
        ...

    def peak_bytes(self) -> int:
        """Return the peak memory."""
        ...


def serve(
    path: Path,
    runtime: str,
    *,
    context: int,
    threads: int,
    parallel: int,
    cache_types: tuple[str, str] = ("f16", "f16"),
    flash_attention: str = "auto",
) -> Server:
    """Return the artifact in its runtime, for use in a `with` statement.

    Raises:
        MissingDependencyError: The runtime is not installed.
        InputError: The runtime is unknown here, or nothing here can run it.
    """
    if runtime == "llama.cpp":
        keys, values = cache_types
        return LlamaServer(
            path,
            context,
            threads,
            parallel,
            cache_type_k=keys,
            cache_type_v=values,
            flash_attention=flash_attention,
            whole_cache=True,
        )
    if runtime in RUNTIMES:
        return PythonServer(path, runtime, context, threads, parallel)
    opens = further_runtime(runtime).server
    if opens is None:
        raise InputError(f"{runtime} cannot be run here: its exporter opens no server")
    served: Server = opens(path, context, threads, parallel)
    return served


def installed(runtime: str) -> bool:
    """Return whether a runtime is installed here."""
    module = "xllamacpp" if runtime == "llama.cpp" else runtime if runtime in RUNTIMES else None
    if module is not None:
        return importlib.util.find_spec(module) is not None
    brought = further_runtimes()
    return runtime in brought and brought[runtime].server is not None


@dataclass(frozen=True, kw_only=True)
class Load:
    """The load that is timed.

    Attributes:
        prompts: Prompt lengths whose first token is timed, with one stream.
        prompt: Prompt length before answers.
        decoded: Tokens of an answer, including the first.
        streams: Numbers of sequences at once. The first is 1.
        rounds: Number of answers that count, after a short one for warming up.
        seconds: Time for everything. If another round would take longer, there are fewer rounds, but at least one.
    """

    prompts: tuple[int, ...] = (16, 64, 256)
    prompt: int = 64
    decoded: int = 48
    streams: tuple[int, ...] = (1,)
    rounds: int = 5
    seconds: float = float("inf")

    def within(self, context: int) -> Load:
        """Return the same load, limited to what fits into a context."""
        decoded = min(self.decoded, max(2, context // 2))
        room = max(1, context - decoded)
        prompts = tuple(dict.fromkeys(min(prompt, room) for prompt in self.prompts))
        return replace(self, prompts=prompts, prompt=min(self.prompt, room), decoded=decoded)


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Times for one number of streams.

    Attributes:
        streams: Sequences at once. Their prompts arrive together.
        prompt: Tokens of each prompt.
        first_ms: For each round, the time until the last stream has its first token.
        step_ms: Time of each decoding step of all rounds.
        spread: Difference between the largest and smallest of the rounds' median steps, divided by their median.
    """

    streams: int
    prompt: int
    first_ms: tuple[float, ...]
    step_ms: tuple[float, ...]
    spread: float

    def tpot_ms(self, percentile: float) -> float:
        """Return a percentile of the time per token after the first."""
        return float(np.percentile(self.step_ms, percentile))

    def ttft_ms(self, percentile: float) -> float:
        """Return a percentile of the time to the first token."""
        return float(np.percentile(self.first_ms, percentile))

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of all streams together."""
        return self.streams * 1e3 / float(np.mean(self.step_ms))

    @property
    def behind(self) -> int:
        """Mean number of tokens before a decoding step: the prompt plus half of the answer."""
        return self.prompt + len(self.step_ms) // len(self.first_ms) // 2

    @property
    def answer_ms(self) -> float:
        """Median time of a whole answer: the first token and all later tokens of a round."""
        steps = np.array(self.step_ms).reshape(len(self.first_ms), -1).sum(axis=1)
        return float(np.median(np.array(self.first_ms) + steps))

    def to_json(self) -> dict[str, Any]:
        """Return percentiles and rates as plain data."""
        figures = {f"tpot_p{one}_ms": self.tpot_ms(one) for one in (50, 95, 99)}
        figures |= {f"ttft_p{one}_ms": self.ttft_ms(one) for one in (50, 95)}
        return {
            "streams": self.streams,
            "prompt_tokens": self.prompt,
            "rounds": len(self.first_ms),
            "decoded_tokens": len(self.step_ms),
            "behind_tokens": self.behind,
            "tokens_per_second": self.tokens_per_second,
            "answer_ms": self.answer_ms,
            "spread": self.spread,
            **figures,
        }


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The result of a timing: its figures, and where and how they were obtained.

    Attributes:
        runtime, machine: The runtime, and the machine that ran it.
        threads, context: CPU threads, and the context that the runtime had room for.
        first_ms: For each prompt length, the times to the first token of all rounds, with one stream.
        loads: Times by number of streams. The first entry is for one stream.
        rounds: Planned number of rounds. The times of each load show how many there were.
        noise: What disturbed the timing.
        peak_bytes: Peak memory of the runtime.
    """

    runtime: str
    machine: str
    threads: int
    context: int
    first_ms: Mapping[int, tuple[float, ...]]
    loads: tuple[Streams, ...]
    rounds: int
    noise: Noise
    peak_bytes: int

    @property
    def alone(self) -> Streams:
        """The times with one stream."""
        return self.loads[0]

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the figures are doubtful: a busy machine, rounds that differ, or fewer rounds than planned."""
        wide = [
            f"rounds at {count_of(one.streams, 'stream')} differ by {one.spread:.0%}"
            for one in self.loads
            if one.spread > _SPREAD
        ]
        few = [
            f"{count_of(len(one.first_ms), 'round')} of {self.rounds} at {count_of(one.streams, 'stream')}, since they "
            "take long here"
            for one in self.loads
            if len(one.first_ms) < self.rounds
        ]
        return (*self.noise.doubts, *wide, *few)

    def first_token_ms(self, percentile: float) -> float:
        """Return a percentile of the time to the first token, of the prompts of the answers' length that came alone."""
        return float(np.percentile([*self.alone.first_ms, *self.first_ms.get(self.alone.prompt, ())], percentile))

    def seconds(self, limit: LatencyLimit) -> float:
        """Return the seconds that a limit applies to: its percentile at its number of streams.

        Raises:
            InputError: That number of streams was not timed.
        """
        for load in self.loads:
            if load.streams == limit.streams:
                found = load.tpot_ms if limit.quantity == "tpot" else load.ttft_ms
                return found(limit.percentile) / 1e3
        raise InputError(f"{limit.streams} streams were not timed, so {limit.name} is not known")

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "runtime": self.runtime,
            "machine": self.machine,
            "threads": self.threads,
            "context": self.context,
            "ttft_ms": {str(prompt): float(np.median(times)) for prompt, times in self.first_ms.items()},
            "ttft_rounds": {str(prompt): len(times) for prompt, times in self.first_ms.items()},
            "loads": [load.to_json() for load in self.loads],
            **asdict(self.noise),
            "doubts": list(self.doubts),
        }


def time_serving(
    path: Path,
    runtime: str,
    load: Load,
    *,
    vocabulary: int,
    context: int,
    threads: int,
    slots: int = 1,
    cache_types: tuple[str, str] = ("f16", "f16"),
    flash_attention: str = "auto",
) -> Timed:
    """Time an artifact in its runtime, after warming up.

    Args:
        path: A GGUF file, or a folder.
        runtime: "llama.cpp", "transformers", "vllm" or "onnxruntime".
        load: What is timed. Prompts that do not fit into the context are shortened.
        vocabulary: Number of its entries. Prompts are its first ids in turn, since times do not depend on them.
        context: Tokens of each sequence.
        threads: CPU threads.
        slots: Sequences to have room for, if more than the load has.
        cache_types, flash_attention: llama.cpp's types of keys and values in the cache, and its attention: "on", "off"
            or "auto".

    Raises:
        VerificationError: The runtime cannot load the artifact.
    """
    load = load.within(context)
    slots = max(slots, *load.streams)
    how: dict[str, Any] = {"cache_types": cache_types, "flash_attention": flash_attention}
    server = serve(path, runtime, context=context, threads=threads, parallel=slots, **how)
    with server:
        server.begin([_prompt(load.prompts[0], vocabulary, 0)])
        server.step()
        ends = monotonic() + load.seconds
        with Watch(threads, server.used_seconds) as watch:
            first = {length: _first(server, load, _prompt(length, vocabulary, 0), ends) for length in load.prompts}
            loads = tuple(_rounds(server, load, streams, vocabulary, ends) for streams in load.streams)
        accelerated, peak = server.accelerated, server.peak_bytes()
    return Timed(
        runtime=runtime,
        machine=machine_name(detect(), accelerated=accelerated),
        threads=threads,
        context=context,
        first_ms=first,
        loads=loads,
        rounds=load.rounds,
        noise=watch.noise,
        peak_bytes=peak,
    )


def _repeated(once: Callable[[], T], load: Load, ends: float) -> list[T]:
    """Return the result of each round: as many as the load has, or fewer if another one would end too late."""
    found = list[T]()
    began = monotonic()
    while len(found) < load.rounds:
        found.append(once())
        now = monotonic()
        if now + (now - began) / len(found) > ends:
            break
    return found


def _first(server: Server, load: Load, prompt: Sequence[int], ends: float) -> tuple[float, ...]:
    """Return the milliseconds until a prompt has its first token, for each round."""
    return tuple(_repeated(lambda: 1e3 * server.begin([prompt]), load, ends))


def _rounds(server: Server, load: Load, streams: int, vocabulary: int, ends: float) -> Streams:
    """Time the rounds that count, after a few tokens for warming up."""
    prompts = [_prompt(load.prompt, vocabulary, stream) for stream in range(streams)]
    server.begin(prompts)
    for _ in range(_WARM_STEPS):
        server.step()

    def answer() -> tuple[float, list[float]]:
        """Return the milliseconds to the first token, and of each later token."""
        return 1e3 * server.begin(prompts), [1e3 * server.step() for _ in range(load.decoded - 1)]

    first, steps = zip(*_repeated(answer, load, ends), strict=True)
    medians = [float(np.median(times)) for times in steps]
    return Streams(
        streams=streams,
        prompt=load.prompt,
        first_ms=first,
        step_ms=tuple(time for times in steps for time in times),
        spread=(max(medians) - min(medians)) / float(np.median(medians)),
    )


def _prompt(length: int, vocabulary: int, stream: int) -> list[int]:
    """Return ids that differ between streams from the first id on, so that no stream reuses another's context."""
    return [(stream + 7 * index) % vocabulary for index in range(length)]
