"""Read the output of `bench.sh` from a board. Faulty output is refused with the reason."""

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
        prompt, decoded: Number of tokens to read, and to decode.
        repetitions: How often each is repeated.
        threads: CPU threads; 0 uses every core of the board.
        cache_k, cache_v: Types of keys and values in the cache.
        flash: Whether to use llama.cpp's fused attention: 1, 0, or "" for llama-bench's default.
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
        machine: What ran the student: the GPU if llama.cpp used one, otherwise the board.
        board: The board or its processor, by the name that its system gives.
        memory_bytes: Memory of its system, or None if not reported.
        system: Kernel and architecture.
        build: Build of llama.cpp.
        threads, cores: CPU threads used, and cores of the board.
        cache_types: Types of keys and values in the cache.
        prompt, decoded: Number of tokens.
        prompt_ms, step_ms: For each repetition, the time of the prompt, and the mean time of a decoding step.
        peak_bytes: Peak memory of llama-bench. None if the board does not report it, or if a GPU holds most of it: GPU
            memory belongs to no process, even on a Jetson, where both share one memory.
        temperature: Highest temperature of the hottest zone in degrees Celsius, or None.
        throttled: Whether the board throttled itself during the run, or None if not reported.
        power_mode: Power mode of a Jetson, otherwise the CPU's governor; empty if unknown.
        watts: Mean power while decoding, or None.
        joules_per_token: Energy while decoding, or None.
        load_average: Load average before the run.
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
    """Read the output of the script.

    Args:
        text: The whole output.
        where: Name of its source in messages: a file or a host.

    Raises:
        InputError: The output is cut off, is of another kind, or reports an error on the board.
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
    """Return the lines of the form `name=value`, and the JSON of each test."""
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
    """Return the types of keys and values in llama-bench's cache. Older builds do not report them and used f16."""
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
    """Return the mean power while decoding: from the processor's energy counter if possible, else from a power rail."""
    before, after = (_number(facts, f"decode.energy_{side}_uj") for side in ("before", "after"))
    began, ended = _number(facts, "decode.began"), _number(facts, "decode.ended")
    # The counter sometimes wraps around.
    if None not in (before, after, began, ended) and after > before and ended > began:  # type: ignore[operator]
        return (after - before) / (ended - began) / 1e6  # type: ignore[operator]
    sampled = _number(facts, "decode.power_uw")
    return sampled / 1e6 if sampled else None


def _throttled(facts: Mapping[str, str]) -> bool | None:
    """Return whether the board was throttled.

    On a Raspberry Pi, bits 0 to 3 mean that it is throttled now, and bits 16 to 19 that it was at some time. Bits 0 to
    3 are clear again after the load, so bits 16 to 19 count too if they were not set before. On other boards, cooling
    states and counts rise under load, and the states fall again.
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
    """Return whether a value shows throttling, compared with the value from before the load."""
    if new.startswith("throttled="):
        now, earlier = _bits(new), _bits(old)
        return bool(now & 0xF or (now & ~earlier) >> 16 & 0xF)
    return old.isdigit() and new.isdigit() and int(new) > int(old)


def _bits(said: str) -> int:
    """Return the bits of the firmware's `throttled=0x50000`; 0 if the text has another form."""
    try:
        return int(said.partition("=")[2], 16)
    except ValueError:
        return 0
