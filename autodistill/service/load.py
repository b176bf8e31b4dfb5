"""Load a server with more and more sequences at once until a limit breaks, and store the result as a measurement."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from autodistill.advisor.describe import Described
from autodistill.advisor.measure import described_export, fingerprint, weights_of
from autodistill.advisor.measurements import Measured, store_measured
from autodistill.errors import InputError, ServiceError
from autodistill.hardware.background_load import Watch
from autodistill.hardware.budget import LatencyLimit
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.hardware.machine import cores, detect, machine_name, memory_bytes
from autodistill.models.config import config_of
from autodistill.options import parsed
from autodistill.service.client import Answer, Client, server_processes
from autodistill.service.keys import client_key
from autodistill.service.monitor import LimitCheck, judge, verdict
from autodistill.service.promise import Promise, asked_promise
from autodistill.service.request import LoadRequest
from autodistill.service.window import Probe, Window
from autodistill.strategy.deployment import Deployment
from autodistill.units import count_of, format_duration

_ANSWERS = 12  # answers of each sequence, after which it asks no more
_PROMPT = 256  # tokens
_WORST = (None, True, False)  # values of `LimitCheck.kept`, the worst last
_FIRST_ID = 3  # ids below it are special in most vocabularies


@dataclass(frozen=True, kw_only=True)
class Level:
    """The figures of a server at one number of sequences at once.

    Attributes:
        streams: Sequences at once. Each asks again as soon as it has its answer.
        prompt: Tokens of each prompt.
        answers: The complete answers.
        seconds: Time that they took.
        memory_bytes: Memory of the server's processes afterwards; None if they cannot be seen.
        broken: The limits that were broken, in words.
    """

    streams: int
    prompt: int
    answers: tuple[Answer, ...]
    seconds: float
    memory_bytes: int | None = None
    broken: tuple[str, ...] = ()

    @property
    def first_seconds(self) -> list[float]:
        """Times to the first token."""
        return [one.first_seconds for one in self.answers]

    @property
    def token_seconds(self) -> list[float]:
        """Times of all later tokens."""
        return [step for one in self.answers for step in one.token_seconds]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all sequences together; the time for reading prompts is included."""
        return sum(one.tokens for one in self.answers) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return percentiles and rates as plain data, with the names of `timing.Streams`."""
        whole = [1e3 * (one.first_seconds + sum(one.token_seconds)) for one in self.answers]
        first, later = self.first_seconds, self.token_seconds
        figures = {f"tpot_p{one}_ms": 1e3 * float(np.percentile(later, one)) for one in (50, 95, 99)}
        figures |= {f"ttft_p{one}_ms": 1e3 * float(np.percentile(first, one)) for one in (50, 95)}
        decoded = sum(len(one.token_seconds) for one in self.answers)
        return {
            "streams": self.streams,
            "prompt_tokens": self.prompt,
            "decoded_tokens": decoded,
            "behind_tokens": self.prompt + decoded // len(self.answers) // 2,
            "tokens_per_second": self.tokens_per_second,
            "requests_per_second": len(self.answers) / self.seconds,
            "answers": len(self.answers),
            "answer_ms": float(np.median(whole)),
            "memory_bytes": self.memory_bytes,
            "broken": list(self.broken),
            **figures,
        }


def load(request: LoadRequest, notify: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Load a server, store the result as a measurement of its device, and return it.

    Args:
        request: What is asked for.
        notify: Called with a line about each number of sequences when it is done.

    Returns:
        Plain data: "levels", with the figures for each number of sequences; "streams", the largest number that kept
        every limit (None if there is none); "capacity", the requests per second at that number; the standing of the
        "promise" (None without one); the measurement under "measured", and the file that it was "kept_in".

    Raises:
        InputError: The student, device or promise does not exist, or the server has no room for the prompts.
        ServiceError: The server cannot be reached, refuses, or answers nothing in time.
    """
    known = devices(*map(Path, request.devices or ()))
    held = asked_promise(request.promise, Path(request.runs), request.margin)
    decoded = parsed(request.decoded)
    prompt = parsed(request.prompt) or (None if held is None else held.prompt) or _PROMPT
    named = None if request.device is None else find_device(request.device, known)
    with Client(request.url, client_key(None if request.key_file is None else Path(request.key_file))) as client:
        if named is None and not client.local:
            raise InputError(f"{request.url} is another machine: say which device it is with --device")
        if not client.local and not request.threads:
            raise InputError(f"{request.url} is another machine: say how many --threads its server has")
        room = client.room()
        needed = prompt + decoded
        if room is not None and needed > room[0]:
            raise InputError(
                f"the server has room for {room[0]} tokens of each sequence, and prompt and answer have {needed}: give "
                "less --prompt or --decoded"
            )
        student = _student(request, client)
        model, deployment = described_export(student, None)
        limits = parsed(request.latency) or ()
        processes = server_processes(client.url) if client.local else ()
        threads = request.threads or cores()
        watch = Watch(min(threads, psutil.cpu_count() or 1), lambda: _used(processes)) if client.local else None
        counts = counts_of(request.counts, held)
        with watch or nullcontext():
            levels = _levels(client, request, counts, prompt, limits, model.spec.vocabulary, notify)
    doubts = watch.noise.doubts if watch is not None else ()
    machine = machine_name(detect(), accelerated=deployment.runtime == "vllm") if named is None else named.name
    facts: dict[str, Any] = {} if named is not None else {"cores": cores(), "memory_bytes": memory_bytes()}
    if watch is not None:
        facts |= asdict(watch.noise)
    if room is not None:
        facts |= {"context": room[0], "slots": room[1]}
    measured = _measured(student, model, deployment, levels, threads=threads, machine=machine, board=facts)
    measured = replace(measured, doubts=doubts)
    path = store_measured(Path(request.runs), measured)
    kept = [one for one in levels if not one.broken]
    return {
        "levels": [one.to_json() for one in levels],
        "streams": kept[-1].streams if kept else None,
        "capacity": kept[-1].to_json()["requests_per_second"] if kept else None,
        "promise": None if held is None else _stand(held, levels, room),
        "measured": measured.to_json(),
        "kept_in": str(path),
    }


def _student(request: LoadRequest, client: Client) -> Path:
    """Return the file or folder of the student that is served."""
    given = parsed(request.student)
    student = given if isinstance(given, Path) else client.model_path()
    if student is None or not student.exists():
        said = "names no file" if student is None else f"serves {student}, which is not here"
        raise InputError(f"{request.url} {said}: give the .gguf file or folder with --student")
    return student


def _used(processes: Sequence[psutil.Process]) -> float:
    """Return the CPU seconds that the server and this process have used."""
    used = time.process_time()
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        used += times.user + times.system
    return used


def _levels(
    client: Client,
    request: LoadRequest,
    counts: Sequence[int],
    prompt: int,
    limits: Sequence[LatencyLimit],
    vocabulary: int,
    notify: Callable[[str], None],
) -> list[Level]:
    """Load the server with each number of sequences in turn, until a limit breaks or the time is over."""
    ends = time.monotonic() + float(parsed(request.time) or 0)
    # The first request may wait for things that the server makes on demand.
    client.complete(varied_prompt(prompt, vocabulary, 0), 2)
    levels: list[Level] = []
    for place, streams in enumerate(counts):
        left = ends - time.monotonic()
        share = left / (len(counts) - place)
        if left <= 0 and not levels:
            asked = format_duration(float(parsed(request.time) or 0))
            raise ServiceError(f"{request.url} gave no whole answer in {asked}: give more --time")
        if left <= 0:
            notify(f"the time is over before {count_of(streams, 'stream')}: give more --time")
            break
        level = run_level(client, streams, prompt, parsed(request.decoded), vocabulary, share)
        if not level.answers:
            if not levels:
                raise ServiceError(f"{request.url} gave no whole answer in {format_duration(share)}: give more --time")
            notify(f"{count_of(streams, 'stream')}: no whole answer in {format_duration(share)}")
            break
        if not level.token_seconds:
            raise ServiceError(
                f"{request.url} ended each answer with its first token, and no later one can be timed: it is to write "
                f"{request.decoded} tokens"
            )
        level = replace(level, broken=broken(level, limits), memory_bytes=client.memory_bytes())
        levels.append(level)
        notify(_said(level))
        if level.broken:
            break
    return levels


def run_level(
    client: Client, streams: int, prompt: int, decoded: int, vocabulary: int, seconds: float, answers: int = _ANSWERS
) -> Level:
    """Let a number of sequences send requests, each as soon as it has its answer.

    Args:
        client: Client of the server.
        streams: Sequences at once.
        prompt, decoded: Tokens of each prompt and answer.
        vocabulary: Size of the vocabulary; the ids of prompts lie below it.
        seconds: Time after which no new request is sent, and requests under way are not counted.
        answers: Number of answers after which a sequence stops.

    Raises:
        ServiceError: A request failed.
    """
    ends = time.monotonic() + seconds
    failed = threading.Event()

    def ask(stream: int) -> list[tuple[float, Answer]]:
        """Send the requests of one sequence, and return the answers with the time at which each arrived."""
        found: list[tuple[float, Answer]] = []
        while len(found) < answers and time.monotonic() < ends and not failed.is_set():
            number = stream + streams * len(found)
            try:
                answer = client.complete(varied_prompt(prompt, vocabulary, number), decoded)
            except ServiceError:
                failed.set()
                raise
            found.append((time.monotonic(), answer))
        return found

    began = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        every = [one for found in pool.map(ask, range(streams)) for one in found]
    # If no answer arrived in time, late answers are used, since they still show how long an answer takes.
    came = [one for one in every if one[0] <= ends] or every
    last = max((at for at, _ in came), default=time.monotonic())
    return Level(
        streams=streams, prompt=prompt, answers=tuple(answer for _, answer in came), seconds=max(1e-9, last - began)
    )


def broken(level: Level, limits: Sequence[LatencyLimit]) -> tuple[str, ...]:
    """Return the limits that a level breaks, in words. Each limit holds at any number of sequences."""
    found = []
    for limit in limits:
        times = level.first_seconds if limit.quantity == "ttft" else level.token_seconds
        value = float(np.percentile(times, limit.percentile)) if times else 0.0
        if value > limit.seconds:
            name = f"{limit.quantity}_p{limit.percentile}"
            found.append(f"{name} {format_duration(value)} of {format_duration(limit.seconds)}")
    return tuple(found)


def counts_of(requested: tuple[int, ...], promise: Promise | None) -> tuple[int, ...]:
    """Return the numbers of sequences to try: those that were asked for, and those that the promise is about."""
    if promise is None:
        return requested
    return tuple(sorted({*requested, *(limit.streams for limit in promise.limits if limit.percentile is not None)}))


def stand(promise: Promise, levels: Sequence[Level], room: tuple[int, int] | None) -> tuple[LimitCheck, ...]:
    """Compare each number of sequences with the limits that cover it; return the worst result for each limit.

    A limit counts as kept only if its own number of sequences was tried.

    Args:
        promise: What is promised.
        levels: At least one level.
        room: Tokens of a sequence and number of sequences that the server has room for, or None if unknown.
    """
    found = []
    for level in levels:
        window = Window(math.inf)
        for one in level.answers:
            probe = Probe(at=0.0, first_seconds=one.first_seconds, token_seconds=one.token_seconds)
            window.add(replace(probe, streams=level.streams, memory_bytes=level.memory_bytes))
        # The first judgement says whether the server answers. The figures already show that it does.
        _, *judged = judge(promise, window, room, level.prompt)
        at = count_of(level.streams, "stream")
        found.append(
            [one if one.value is None else replace(one, comparison=f"{one.comparison} at {at}") for one in judged]
        )
    tried, stands = {level.streams for level in levels}, []
    for limit, *same in zip(promise.limits, *found, strict=True):
        worst = max(same, key=lambda one: (_WORST.index(one.kept), one.value or 0.0))
        if worst.kept and limit.percentile is not None and limit.streams not in tried:
            untried = f"{worst.comparison}, and {count_of(limit.streams, 'stream')} were not tried"
            worst = replace(worst, kept=None, comparison=untried)
        stands.append(worst)
    return tuple(stands)


def _stand(promise: Promise, levels: Sequence[Level], room: tuple[int, int] | None) -> dict[str, Any]:
    """Return how a promise stands, as plain data."""
    judged = stand(promise, levels, room)
    return {"of": promise.of, "verdict": verdict(judged), "promise": [one.to_json() for one in judged]}


def _said(level: Level) -> str:
    found = level.to_json()
    told = (
        f"{count_of(level.streams, 'stream')}: {found['tokens_per_second']:.4g} tokens/s, first token p95 "
        f"{format_duration(found['ttft_p95_ms'] / 1e3)}, per token p95 {format_duration(found['tpot_p95_ms'] / 1e3)}"
    )
    return f"{told}; broken: {', '.join(level.broken)}" if level.broken else told


def _measured(
    student: Path,
    model: Described,
    deployment: Deployment,
    levels: Sequence[Level],
    *,
    threads: int,
    machine: str,
    board: Mapping[str, Any],
) -> Measured:
    """Return the levels as a measurement. Its single figures are those of one sequence alone."""
    alone = levels[0]
    figures = alone.to_json()
    first = float(np.median(alone.first_seconds))
    steps = alone.token_seconds
    return Measured(
        student=fingerprint(student),
        name=str(student),
        shape=config_of(model.spec),
        deployment=deployment.to_json(),
        size_bytes=sum(file.stat().st_size for file in weights_of(student)),
        machine=machine,
        how="autodistill load",
        threads=threads,
        prompt=alone.prompt,
        context=figures["behind_tokens"],
        ttft_ms=1e3 * first,
        tpot_ms=figures["tpot_p50_ms"],
        tpot_p95_ms=figures["tpot_p95_ms"],
        tokens_per_second=1 / float(np.mean(steps)),
        prompt_tokens_per_second=alone.prompt / first,
        peak_bytes=max((one.memory_bytes for one in levels if one.memory_bytes is not None), default=None),
        board=dict(board),
        loads=tuple(one.to_json() for one in levels),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def varied_prompt(length: int, vocabulary: int, number: int) -> list[int]:
    """Return ids that differ between requests from the first id on, so that no answer profits from another's prompt."""
    first = min(_FIRST_ID, vocabulary - 1)
    return [first + (number + 7 * place) % (vocabulary - first) for place in range(length)]
