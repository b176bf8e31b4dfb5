"""Command lines alone: numbers, amounts and names with which nothing can be requested."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.hostile.cases import Case, Kit

_NUMBERS = (
    "0",
    "-1",
    "1e3",
    "nan",
    "inf",
    "-inf",
    "",
    " ",
    "x",
    "1.5",
    "0x10",
    "١٢",
    "1_000",
    "10" * 11,
    "9" * 400,
    "9" * 5_000,
)
# Some options read these as numbers: a seed or a temperature may have any value, and a prompt may be too long for all.
_MEANT = ("1e3", "1.5", "1_000", "١٢", "10" * 11, "9" * 400)
_AMOUNTS = (
    "",
    " ",
    "0GB",
    "-1GB",
    "1",
    "GB",
    "1XB",
    "nanGB",
    "infGB",
    "1e400GB",
    "9" * 400 + "GB",
    "9" * 5_000 + "GB",
    "1 G B",
    "0.1B",
    ".GB",
    "1GB" * 500,
)
_TIMES = (
    "",
    "0s",
    "-1s",
    "1",
    "s",
    "1y",
    "nanh",
    "9" * 400 + "h",
    "9" * 5_000 + "s",
    "1s1h",
    "1h1h",
    "1e9s",
    "0.000001us",
    "١s",
)
NAMES = (
    "",
    ".",
    "..",
    "a/b",
    "../x",
    "/tmp",
    "-",
    "--",
    "x" * 256,
    "x" * 5_000,
    "a\nb",
    "a\x1b[31mb",
    "\udcff",
    "é" * 200,
    " ",
    "NUL\t",
)
_LATENCIES = (
    "",
    "0ms",
    "50",
    "ttft=",
    "ttft_p0=1ms",
    "ttft_p100=1ms",
    "tpot_p95=1ms,tpot_p95=2ms",
    "1ms@streams=0",
    "1ms@streams=" + "9" * 30,
    "1ms@",
    "@streams=1",
    "9" * 5_000 + "ms",
    "tpot_p95=nan",
)
_SPEED_OF_A_DEVICE = ("--device", "4090")


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    count = 0

    def case(*argv: str, codes: tuple[int, ...] = (2,)) -> Case:
        nonlocal count
        count += 1
        shown = "".join(c if c.isalnum() else "-" for c in f"{argv[0]}-{argv[-2] if len(argv) > 1 else ''}".strip())
        return Case(area="arguments", name=f"{count:03d}-{shown[:40]}", argv=argv, codes=codes)

    teacher, text = str(kit.teacher), str(kit.text)
    # Without --plan, because a command that should be refused must not train either.
    search = (
        "search",
        "--teacher",
        teacher,
        "--data",
        text,
        "--budget",
        "1GB",
        "--runs",
        "runs",
        "--cache",
        "cache",
        "--runner",
        "inline",
    )
    for option in (
        "--tokens",
        "--trials",
        "--seed",
        "--context",
        "--batch",
        "--sequence-length",
        "--step-tokens",
        "--confirm",
    ):
        for value in _NUMBERS:
            if (option, value) in (("--seed", "0"), ("--seed", "1_000")):
                continue
            # If the number can be meant, a budget that nothing fits is given too.
            yield case(*_with(search, "--budget", "1kB"), option, value, codes=(2, 3))
    for option in (
        "--tokens",
        "--trials",
        "--seed",
        "--context",
        "--batch",
        "--sequence-length",
        "--step-tokens",
        "--confirm",
    ):
        for value in ("1" + "0" * 20, str(2**63), str(2**64 - 1), str(10**12)):
            yield case(*search, option, value, codes=(2, 3))
    for option, values in {
        "--explore": _NUMBERS,
        "--budget": _AMOUNTS,
        "--cache-limit": _AMOUNTS,
        "--checkpoint-limit": _AMOUNTS,
        "--time": _TIMES,
        "--latency": _LATENCIES,
        "--price": ("", "0/h", "1", "nan/h", "9" * 400 + "/h", "9" * 5_000 + "/h", "1/d", "$1EUR/h"),
        "--name": NAMES,
        "--metric": NAMES[2:],
        "--objectives": (*NAMES[4:], "accuracy,accuracy", ",", "accuracy," * 500),
        "--sampler": NAMES,
        "--runner": NAMES,
        "--space": NAMES,
        "--baseline": NAMES,
        "--warm-start": NAMES,
        "--device": (*NAMES, "9" * 5_000),
        "--storage": (*NAMES, "s3://", "file://", "gs://x" * 100, "http://x/y", "s3://a:b@c/d"),
        "--gpus-per-trial": _NUMBERS[3:],
        "--cpus-per-trial": _NUMBERS,
        "--teacher": NAMES,
        "--data": (
            *NAMES,
            "reasoning-gym:",
            "reasoning-gym:nothing",
            "reasoning-gym:chain_sum?size=" + "9" * 30,
            "reasoning-gym:chain_sum?size=-1",
        ),
        "--task": NAMES,
        "--metric-command": ("", " ", "'", "\\", "true"),
    }.items():
        for value in values:
            codes = (2, 3)
            base = _with(search, "--budget", "1kB") if option != "--budget" else search
            yield case(*_without(base, option), option, value, codes=codes)
    for option in (
        "--layers",
        "--width",
        "--heads",
        "--kv-heads",
        "--head-dim",
        "--ffn",
        "--vocab",
        "--experts",
        "--active-experts",
        "--window",
        "--context",
        "--batch",
        "--prompt",
        "--training",
    ):
        shape = ("estimate", "--layers", "2", "--width", "64", "--heads", "4", "--ffn", "128", "--vocab", "300")
        for value in [*dice.sample(_NUMBERS, 6), "1" + "0" * 20, "1" + "0" * 9]:
            more = () if option != "--prompt" else _SPEED_OF_A_DEVICE
            yield case(*_without(shape, option), *more, option, value, codes=(0, 2))
    for option, values in {
        "--format": NAMES,
        "--runtime": NAMES,
        "--kv-type": NAMES,
        "--strategy": NAMES,
        "--device": NAMES,
    }.items():
        for value in values:
            yield case(
                "estimate",
                teacher,
                option,
                value,
                codes=(0, 2) if option in ("--runtime", "--format") and not value else (2,),
            )
    for option, values in {
        "--max-tokens": _NUMBERS,
        "--temperature": _NUMBERS[1:],
        "--top-p": _NUMBERS,
        "--top-k": _NUMBERS[1:],
        "--batch": _NUMBERS,
        "--seed": _NUMBERS[1:],
        "--timeout": _TIMES,
        "--endpoint": (*NAMES, "http://a..b/v1", f"http://{'x' * 70}/v1", f"http://{'é' * 200}/v1"),
    }.items():
        for value in values:
            base = _without(kit.write(teacher), option)
            yield case(*base, option, value, codes=(0, 2) if value in _MEANT else (2,))
    for option, values in {
        "--streams": (*_NUMBERS, "1,,2", ",", "1," * 400 + "1", "0"),
        "--context": _NUMBERS,
        "--prompt": _NUMBERS,
        "--decoded": _NUMBERS,
        "--rounds": _NUMBERS,
        "--threads": _NUMBERS[1:],
        "--timeout": _TIMES,
        "--on": NAMES,
        "--device": NAMES,
    }.items():
        for value in dice.sample(values, min(len(values), 9)):
            yield case("measure", teacher, "--runs", "runs", "--cache", "cache", option, value)
    # A budget that nothing fits, so that nothing is solved even if the value can be meant.
    solve = ("solve", teacher, "--data", text, "--budget", "1kB", "--cache", "cache", "--out", "solved")
    for option, values in {
        "--budget": _AMOUNTS,
        "--sweep": (*_AMOUNTS, *(f"{amount}..2GB" for amount in _AMOUNTS), "2GB..1GB", "1GB..", "..", "1kB..2kB..3kB"),
        "--device": NAMES,
        "--context": _NUMBERS,
        "--batch": _NUMBERS,
        "--tokens": _NUMBERS,
        "--sequence-length": _NUMBERS,
        "--memory": _AMOUNTS,
    }.items():
        base = _without(solve, "--budget") if option in ("--budget", "--sweep") else solve
        for value in dice.sample(values, min(len(values), 16)):
            yield case(*_without(base, option), option, value, codes=(2, 3))
    for command in ("leaderboard", "explain", "export", "pick", "report", "show", "reproduce"):
        for value in NAMES:
            more = (
                ("--to", "gguf", "--out", "students")
                if command == "export"
                else ("--budget", "1GB")
                if command == "pick"
                else ()
            )
            if command != "export":
                more += ("--runs", "runs")
            yield case(command, *more, "--", value)
    for option, values in {
        "--budget": _AMOUNTS,
        "--latency": _LATENCIES,
        "--streams": _NUMBERS,
        "--min-accuracy": _NUMBERS,
        "--context": _NUMBERS,
    }.items():
        for value in dice.sample(values, 6):
            base = ("pick", "--runs", "runs") + (("--budget", "1GB") if option != "--budget" else ())
            yield case(*base, option, value)
    for command in ("devices", "spaces", "strategies"):
        for value in NAMES:
            yield case(command, "--", value, codes=(0, 2) if command == "devices" and not value.strip() else (2,))
    for argv in (
        ("nothing",),
        ("",),
        ("--nothing",),
        ("search", "--nothing"),
        ("search", "--format", "xml"),
        ("export",),
        ("x" * 5_000,),
        ("search", "--" + "x" * 5_000),
    ):
        yield case(*argv)


def _without(argv: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Return the words without an option and its value."""
    if option not in argv:
        return argv
    place = argv.index(option)
    return argv[:place] + argv[place + 2 :]


def _with(argv: tuple[str, ...], option: str, value: str) -> tuple[str, ...]:
    return (*_without(argv, option), option, value)
