"""`measure`: the speed and memory of a student, here or on a board."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from autodistill.api.paths import as_path, cache_folder
from autodistill.errors import InputError
from autodistill.options import RUNS, Cache, Devices, Option, Out
from autodistill.units import parse_duration


def _tokens(help: str) -> Option:
    """Return an option that gives a length in tokens."""
    return Option(help=help, metavar="TOKENS", typed=int)


def measure(
    student: Annotated[
        str | Path,
        Option(help="A .gguf file, or a transformers folder.", metavar="STUDENT", typed=Path, argument=True),
    ],
    *,
    on: Annotated[
        str | None, Option(help="Measure on a board, like ssh://pi@raspberrypi.local.", metavar="ssh://HOST")
    ] = None,
    script: Annotated[
        str | Path | None,
        Option(help="Write a script to run on a board without ssh.", metavar="FILE", typed=Path),
    ] = None,
    result: Annotated[
        str | Path | None, Option(help="Read what that script printed.", metavar="FILE", typed=Path)
    ] = None,
    bench: Annotated[str | None, Option(help="Path of llama-bench on the board.", metavar="PATH")] = None,
    device: Annotated[
        str | None,
        Option(help="Which device the board is (default: found by its own name).", metavar="NAME", complete="devices"),
    ] = None,
    ssh_config: Annotated[
        str | Path | None, Option(help="ssh configuration to use instead of your own.", metavar="FILE", typed=Path)
    ] = None,
    context: Annotated[
        int | None, _tokens("Measured here: context of each stream (default: 2048, or the student's limit).")
    ] = None,
    streams: Annotated[
        str | Sequence[int],
        Option(help="Measured here: numbers of sequences decoded at once, like 1,4,16.", metavar="N,..."),
    ] = "1",
    prompt: Annotated[int | None, _tokens("Length of the prompt before the first token (default: 512).")] = None,
    decoded: Annotated[int | None, _tokens("Length of an answer (default: 64).")] = None,
    rounds: Annotated[int | None, Option(help="Number of repetitions (default: 3).", metavar="N", typed=int)] = None,
    threads: Annotated[int, Option(help="CPU threads; 0 uses every core.", metavar="N", typed=int, least=0)] = 0,
    timeout: Annotated[
        str | float | None, Option(help="Stop waiting for a board after this long (default: 30m).", metavar="TIME")
    ] = None,
    busy: Annotated[bool, Option(help="Measure even if the machine is busy, and mark the result.", typed=bool)] = False,
    devices: Devices = None,
    out: Out = RUNS,
    cache: Cache = None,
) -> dict[str, Any]:
    """Measure a student's speed and memory, here or on a board with llama-bench. pick uses the results.

    Returns:
        Plain data: what was measured and what had been predicted; of `script`, where it was written.

    Raises:
        InputError: A student that cannot be read, arguments that change nothing here, or a busy machine.
        RemoteError: A board that is not reached, or fails.
    """
    from autodistill.advisor.measure import MeasureRequest
    from autodistill.advisor.measure import measure as measured

    return measured(
        MeasureRequest(
            student=Path(student),
            out=Path(out),
            on=on,
            script=as_path(script),
            result=as_path(result),
            bench=bench,
            device=device,
            own=[Path(file) for file in devices or ()],
            ssh_config=as_path(ssh_config),
            context=context,
            streams=_counts(streams),
            prompt=prompt,
            decoded=decoded,
            rounds=rounds,
            threads=threads,
            cache=cache_folder(cache),
            timeout=parse_duration(timeout) if isinstance(timeout, str) else timeout,
            busy=busy,
        )
    )


def _counts(streams: str | Sequence[int]) -> tuple[int, ...]:
    """Return numbers of sequences, as numbers or in one text."""
    if not isinstance(streams, str):
        return tuple(streams)
    words = [word.strip() for word in streams.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 20 for word in words):
        raise InputError(f"--streams {streams!r} must be numbers separated by commas, like 1,4,16")
    return tuple(int(word) for word in words)
