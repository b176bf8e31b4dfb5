"""Watch a server: send small requests for latency, read its counters and memory, and compare them with a promise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from autodistill.errors import InputError, ServiceError
from autodistill.service.client import Client
from autodistill.service.promise import Limit, Promise
from autodistill.service.window import Figures, Probe, Window

WINDOW_SECONDS, EVERY_SECONDS = 300.0, 5.0
PROMPT, DECODED = 64, 16
"""Tokens of a probe's prompt and of its answer. A search times first tokens with prompts of the same length."""
_SHARE = 0.1  # share of the time that probes may take
_SPREAD = 200  # the ids of probes lie below this, and every vocabulary is larger


@dataclass(frozen=True, kw_only=True)
class LimitCheck:
    """One limit of a promise, and how the observed value compares with it.

    Attributes:
        figure: Like "ttft_p95", "memory", or "answers", which says whether the server answers at all.
        kept: Whether the limit is kept; None if that cannot be said.
        value, most: The observed value and its limit, in seconds or bytes.
        comparison: The comparison in words.
    """

    figure: str
    kept: bool | None
    value: float | None
    most: float | None
    comparison: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "figure": self.figure,
            "kept": self.kept,
            "value": self.value,
            "limit": self.most,
            "said": self.comparison,
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report on a served student: what is known of its server now.

    Attributes:
        at: Seconds since the first look.
        up: Whether the last probe had an answer.
        why: Why it had none.
        runtime: "llama.cpp" or "vllm", or "" if unknown.
        last: The latest look.
        figures: The figures of the window.
        judged: One entry for each limit of the promise, and one for "answers"; empty without a promise.
    """

    at: float
    up: bool
    why: str
    runtime: str
    last: Probe
    figures: Figures
    judged: tuple[LimitCheck, ...]

    @property
    def broken(self) -> tuple[LimitCheck, ...]:
        """The parts of the promise that are not kept."""
        return tuple(one for one in self.judged if one.kept is False)

    @property
    def verdict(self) -> str | None:
        """ "OK", "BROKEN", or "UNKNOWN" if nothing could be judged yet; None without a promise."""
        return verdict(self.judged)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "at": self.at,
            "up": self.up,
            "why": self.why or None,
            "runtime": self.runtime or None,
            **self.figures.to_json(),
            "verdict": self.verdict,
            "broken": [one.figure for one in self.broken],
            "promise": [one.to_json() for one in self.judged],
        }


class Monitor:
    """Looks at a server from time to time.

    A probe is a small request: a prompt of `prompt` tokens that asks for `DECODED` tokens. Probes take at most a tenth
    of the time, so the wait after a slow probe is longer.

    Args:
        client: Client of the server.
        promise: The promise that the server must keep, or None.
        window: Seconds over which averages are taken.
        every: Least number of seconds between two probes.
        clock, sleep: For tests.

    Raises:
        InputError: The window is too short for two probes.
    """

    def __init__(
        self,
        client: Client,
        promise: Promise | None = None,
        *,
        window: float = WINDOW_SECONDS,
        every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if window < 2 * every:
            raise InputError(f"a --window of {window:g}s holds no two looks {every:g}s apart: give a longer one")
        self.client, self.promise, self.window = client, promise, Window(window)
        self.prompt = (promise.prompt if promise else None) or PROMPT
        self._every, self._clock, self._sleep = every, clock, sleep
        self._number = count()
        self._room: tuple[int, int] | None = None
        self._runtime = ""
        self._began = clock()

    def watch(self, seconds: float | None = None) -> Iterator[Report]:
        """Yield a report after each look, for a number of seconds or without end."""
        while True:
            began = self._clock()
            report = self.look()
            taken = self._clock() - began
            yield report
            wait = max(self._every - taken, taken * (1 / _SHARE - 1) if report.up else 0.0, 0.0)
            if seconds is not None and self._clock() - self._began + wait >= seconds:
                return
            self._sleep(wait)

    def look(self) -> Report:
        """Probe the server, read its counters and memory, and report on it."""
        probe, why = self._probe()
        self.window.add(probe)
        judged = () if self.promise is None else judge(self.promise, self.window, self._room, self._length(), why)
        return Report(
            at=probe.at - self._began,
            up=not why,
            why=why,
            runtime=self._runtime,
            last=probe,
            figures=self.window.figures(),
            judged=judged,
        )

    def _probe(self) -> tuple[Probe, str]:
        try:
            before = self.client.counters()
            self._runtime = before.runtime
            if self._room is None:
                self._room = self.client.room()
            answer = self.client.complete(self._prompt(), DECODED)
            after = self.client.counters()
            memory = self.client.memory_bytes()
        except ServiceError as error:
            return Probe(at=self._clock(), failed=True), str(error)
        return Probe(
            at=self._clock(),
            first_seconds=answer.first_seconds,
            token_seconds=answer.token_seconds,
            streams=1 + round(max(before.running + before.waiting, after.running + after.waiting)),
            answer_tokens=after.answer_tokens,
            running=before.running,
            waiting=before.waiting,
            memory_bytes=memory,
            acceptance=after.acceptance,
        ), ""

    def _prompt(self) -> list[int]:
        """Return ids that differ from the last probe's from the first id on, so that the server reads all of them."""
        number = next(self._number)
        return [3 + (number + 7 * place) % (_SPREAD - 3) for place in range(self._length())]

    def _length(self) -> int:
        """Return the tokens of a prompt: fewer if the server has no room for the usual number."""
        return self.prompt if self._room is None else max(1, min(self.prompt, self._room[0] - DECODED - 1))


def verdict(judged: Sequence[LimitCheck]) -> str | None:
    """Return "OK", "BROKEN", or "UNKNOWN" if nothing could be judged; None if there was nothing to judge."""
    if not judged:
        return None
    if any(one.kept is False for one in judged):
        return "BROKEN"
    return "OK" if any(one.kept is not None and one.figure != "answers" for one in judged) else "UNKNOWN"


def judge(
    promise: Promise, window: Window, room: tuple[int, int] | None, prompt: int | None, why: str = ""
) -> tuple[LimitCheck, ...]:
    """Compare the observed figures with each limit of a promise.

    Args:
        promise: What is promised.
        window: What was observed.
        room: Tokens of a sequence and number of sequences that the server has room for, or None if unknown.
        prompt: Tokens of the prompts whose first tokens were timed.
        why: Why the last probe had no answer; empty if it had one.
    """
    answers = LimitCheck(figure="answers", kept=not why, value=None, most=None, comparison=why or "it answers")
    return (answers, *(_judged(limit, promise, window, room, prompt) for limit in promise.limits))


def _judged(
    limit: Limit, promise: Promise, window: Window, room: tuple[int, int] | None, prompt: int | None
) -> LimitCheck:
    value: float | None = None
    why_not = ""
    if limit.quantity == "memory":
        seen = window.figures().most_memory_bytes
        if room is not None and room[0] * room[1] > _rounded(promise.context) * promise.streams:
            why_not = f"it has room for {room[1]} x {room[0]} tokens, more than {promise.streams} x {promise.context}"
        elif seen is None:
            why_not = "its process is not seen from here"
        else:
            value = float(seen)
    else:
        assert limit.percentile is not None
        found = window.times(limit.quantity, limit.streams)
        if limit.prompt is not None and prompt != limit.prompt:
            why_not = f"prompts have {prompt} tokens, and it is promised of {limit.prompt}"
        elif found:
            value = float(np.percentile(found, limit.percentile))
        elif window.times(limit.quantity):
            why_not = f"more than {limit.streams} sequences at once, for which nothing is promised"
        else:
            why_not = "no probe had an answer"
    kept = None if value is None else value <= limit.most
    asked = "" if limit.requested else " (measured, and a margin)"
    told = why_not if value is None else f"{limit.shown(value)} of {limit.shown(limit.most)}{asked}"
    return LimitCheck(figure=limit.figure, kept=kept, value=value, most=limit.most, comparison=told)


def _rounded(context: int) -> int:
    """Return the context that llama.cpp makes of a context: the next multiple of 256."""
    return -(-context // 256) * 256
