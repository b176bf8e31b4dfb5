"""Reading of what `bench.sh` printed on a board; faulty output is refused with the reason."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.errors import InputError
from autodistill.quantization.formats import CACHE_BYTES

_SCRIPT = Path(__file__).with_name("bench.sh")
_VERSION = "1"
_LINE = re.compile(r"([a-z][a-z_.-]*)=(.*)")
_TESTS = ("prompt", "decode")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The settings of a llama-bench run.

    Attributes:
        student: SHA-256 of the GGUF file.
        student_bytes: Its size.
        prompt, decoded: Tokens of the prompt, and of the decoding.
        repetitions: Of each.
        threads: CPU threads; 0 is as many as the board has cores.
        cache_k, cache_v: What keys and values are held in.
        flash: Whether attention is llama.cpp's fused one: 1 or 0, or "" for what llama-bench takes.
    """

    student: str
    student_bytes: int
    prompt: int = 512
    decoded: int = 64
    repetitions: int = 3
    threads: int = 0
    cache_k: str = "f16"
    cache_v: str = "f16"
    flash: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "decoded", "repetitions"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.threads < 0:
            raise InputError(f"--threads must be at least 1, not {self.threads}")

    def script(self) -> str:
        """Return the POSIX shell script for a board."""
        settings = "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in asdict(self).items())
        return f"#!/bin/sh\n# Written by autodistill measure.\n{settings}\n{_SCRIPT.read_text(encoding='utf-8')}"


@dataclass(frozen=True, kw_only=True)
class BoardResult:
    """What a board reported about itself and about the student.

    Attributes:
        student: SHA-256 of the file that was run.
        machine: What ran it: the GPU where llama.cpp used one, else the board.
        board: The board or its processor, as its system calls it.
        memory_bytes: That its system has, or None where it does not tell.
        system: Kernel and architecture.
        build: Of llama.cpp.
        threads, cores: CPU threads used, and cores there.
        cache_types: What keys and values were held in.
        prompt, decoded: Tokens.
        prompt_ms, step_ms: Of each repetition, the prompt's time, and the mean time of a decoding step.
        peak_bytes: The most memory llama-bench had, or None where the board does not tell, or where a GPU holds most:
            what that has is in no process, on a Jetson either, whose memory they share.
        temperature: The hottest zone's highest, in degrees Celsius, or None.
        throttled: Whether the board slowed itself down meanwhile, or None where it does not tell.
        power_mode: Of a Jetson, else the CPU's governor; empty where unknown.
        watts: Mean while decoding, or None.
        joules_per_token: While decoding, or None.
        load_average: Before.
    """

    student: str
    machine: str
    board: str
    memory_bytes: int | None
    system: str
    build: str
    threads: int
    cores: int
    cache_types: tuple[str, str]
    prompt: int
    decoded: int
    prompt_ms: tuple[float, ...]
    step_ms: tuple[float, ...]
    peak_bytes: int | None
    temperature: float | None
    throttled: bool | None
    power_mode: str
    watts: float | None
    joules_per_token: float | None
    load_average: float | None


def parse_result(text: str, where: str) -> BoardResult:
    """Read what the script printed.

    Args:
        text: All of it.
        where: What it is called in messages: a file or a host.

    Raises:
        InputError: It is cut off, of another kind, or says what went wrong on the board.
    """
    facts, tests = _split(text)
    if facts.get("autodistill-bench") != _VERSION:
        raise InputError(f"{where} is no result of autodistill measure --script: give the file that the script wrote")
    if "error" in facts:
        raise InputError(f"{where}: {facts['error']}")
    if facts.get("end") != "ok":
        raise InputError(f"{where} is cut off before its end: run the script again and keep all of its output")
    prompt, decode = (_test(tests.get(name), name, where) for name in _TESTS)
    first, times = (_samples(test, where) for test in (prompt, decode))
    prompt_tokens, decoded = int(prompt["n_prompt"]), int(decode["n_gen"])
    if prompt_tokens < 1 or decoded < 1:
        raise InputError(f"{where}: llama-bench timed no prompt or no decoding")
    steps = tuple(time / decoded for time in times)
    watts = _watts(facts)
    board = facts.get("machine", "") or "an unnamed board"
    gpu = str(decode.get("gpu_info") or "").strip()
    memory = _number(facts, "memory_kb")
    seconds = float(np.mean(steps)) / 1e3
    return BoardResult(
        student=facts.get("student", ""),
        machine=gpu or board,
        board=board,
        memory_bytes=int(1024 * memory) if memory else None,
        system=facts.get("system", ""),
        build=f"{decode.get('build_commit', '?')} ({decode.get('build_number', '?')})",
        threads=int(_number(facts, "threads") or 1),
        cores=int(_number(facts, "cores") or 1),
        cache_types=_cache_types(decode, where),
        prompt=prompt_tokens,
        decoded=decoded,
        prompt_ms=first,
        step_ms=steps,
        peak_bytes=None if gpu else _most(facts, "peak_kb", 1024),
        temperature=None if (hot := _most(facts, "temperature_mc", 1)) is None else hot / 1000,
        throttled=_throttled(facts),
        power_mode=facts.get("power_mode", ""),
        watts=watts,
        joules_per_token=None if watts is None else watts * seconds,
        load_average=_number(facts, "load_average"),
    )


def _split(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the lines of `name=value`, and the JSON of each test."""
    facts: dict[str, str] = {}
    tests: dict[str, str] = {}
    inside = ""
    kept: list[str] = []
    for line in text.splitlines():
        if inside:
            if line == f"{inside}.json-end":
                tests[inside], inside, kept = "\n".join(kept), "", []
            else:
                kept.append(line)
        elif line.endswith(".json") and line.removesuffix(".json") in _TESTS:
            inside = line.removesuffix(".json")
        elif found := _LINE.fullmatch(line):
            facts.setdefault(found[1], found[2].strip())
    return facts, tests


def _test(text: str | None, name: str, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text or "")
    except ValueError:
        raise InputError(f"{where}: llama-bench's output of the {name} is cut off or no JSON: run it again") from None
    known = isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict)
    wanted = ("n_prompt", "n_gen", "samples_ns")
    if not known or any(key not in found[0] for key in wanted):
        raise InputError(f"{where}: llama-bench's output of the {name} lacks {', '.join(wanted)}: update llama.cpp")
    if any(type(found[0][key]) is not int for key in wanted[:2]):
        raise InputError(f"{where}: llama-bench's output of the {name} counts its tokens in no whole numbers")
    test: dict[str, Any] = found[0]
    return test


def _cache_types(test: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return what llama-bench held keys and values in; older builds do not say, and had what is usual."""
    keys, values = (test.get(name, "f16") for name in ("type_k", "type_v"))
    for one in (keys, values):
        if one not in CACHE_BYTES:
            known = ", ".join(CACHE_BYTES)
            raise InputError(f"{where}: llama-bench held its cache in {one!r}, which is none of {known}")
    return keys, values


def _samples(test: Mapping[str, Any], where: str) -> tuple[float, ...]:
    """Return the milliseconds of each repetition."""
    values = test["samples_ns"]
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: llama-bench timed nothing")
    if not all(type(value) in (int, float) and math.isfinite(value) and value > 0 for value in values):
        raise InputError(f"{where}: llama-bench has times that are no numbers above zero")
    return tuple(value / 1e6 for value in values)


def _number(facts: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(facts.get(name, ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _most(facts: Mapping[str, str], name: str, factor: int) -> int | None:
    found = [value for test in _TESTS if (value := _number(facts, f"{test}.{name}"))]
    return int(max(found) * factor) if found else None


def _watts(facts: Mapping[str, str]) -> float | None:
    """Return the mean power while decoding: from the processor's energy counter, else from the sampled rail."""
    before, after = (_number(facts, f"decode.energy_{side}_uj") for side in ("before", "after"))
    began, ended = _number(facts, "decode.began"), _number(facts, "decode.ended")
    # The counter wraps around now and then.
    if None not in (before, after, began, ended) and after > before and ended > began:  # type: ignore[operator]
        return (after - before) / (ended - began) / 1e6  # type: ignore[operator]
    sampled = _number(facts, "decode.power_uw")
    return sampled / 1e6 if sampled else None


def _throttled(facts: Mapping[str, str]) -> bool | None:
    """Return whether the board was throttled: for a Raspberry Pi, bits 0 to 3 mean now, and 16 to 19 ever.

    Once the load is gone the lower ones are clear again, but of the upper ones those that were not set before show it.
    Elsewhere states and counts of cooling rise, and the states fall again.
    """
    told = False
    for test in _TESTS:
        before, *seen = (facts.get(f"{test}.throttled_{when}", "").split() for when in ("before", "meanwhile", "after"))
        for old, new in product(before[:1], chain(*seen)):
            told = True
            if _slowed(old, new):
                return True
    return False if told else None


def _slowed(old: str, new: str) -> bool:
    """Return whether a value shows throttling, compared with the value before the load."""
    if new.startswith("throttled="):
        now, earlier = _bits(new), _bits(old)
        return bool(now & 0xF or (now & ~earlier) >> 16 & 0xF)
    return old.isdigit() and new.isdigit() and int(new) > int(old)


def _bits(said: str) -> int:
    """Return the bits of the firmware's `throttled=0x50000`; none if the text has another form."""
    try:
        return int(said.partition("=")[2], 16)
    except ValueError:
        return 0
