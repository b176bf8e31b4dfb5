"""The request of `measure`. Its fields are the options of the command line and of Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from autodistill.errors import InputError
from autodistill.hardware.budget import check_streams
from autodistill.models.model_folder import gguf_within
from autodistill.options import RUNS, Cache, Devices, Option, Runs, counts_tokens, parsed, read_texts
from autodistill.units import parse_duration

# Options that only apply to some ways to measure, and those ways.
_PLACES = {
    "bench": ("--on",),
    "ssh_config": ("--on",),
    "device": ("--on", "--result"),
    "runtime": ("here",),
    "context": ("here",),
    "streams": ("here",),
    "busy": ("here",),
    "prompt": ("here", "--on", "--script"),
    "decoded": ("here", "--on", "--script"),
    "rounds": ("here", "--on", "--script"),
    "threads": ("here", "--on", "--script"),
    "timeout": ("--on",),
}
# Options that apply only when a whole student is measured, not with --blocks.
_OF_STUDENTS = ("on", "script", "result", "runtime", "streams", "prompt", "decoded", "threads", "timeout", "devices")


def _file(help: str) -> Option:
    return Option(help=help, metavar="FILE", typed=Path, parse=Path)


def read_counts(text: str) -> tuple[int, ...]:
    """Parse numbers of sequences, like "1,4,16"."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 20 for word in words):
        raise InputError(f"--streams {text!r} must be numbers separated by commas, like 1,4,16")
    return tuple(int(word) for word in words)


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """The arguments of `measure`: the student, the place and the way to measure it.

    The fields are documented by `Option.help`.
    """

    student: Annotated[
        str | Path,
        Option(
            help="A .gguf file, or an exported folder; with --blocks any teacher.",
            metavar="STUDENT",
            typed=Path,
            parse=Path,
            argument=True,
        ),
    ] = field(kw_only=False)
    runtime: Annotated[
        str | None,
        Option(
            help="What serves it: llama.cpp, transformers, vllm or onnxruntime (default: as the student is).",
            metavar="NAME",
        ),
    ] = None
    on: Annotated[
        str | None, Option(help="Measure on a board, like ssh://pi@raspberrypi.local.", metavar="ssh://HOST")
    ] = None
    script: Annotated[str | Path | None, _file("Write a script to run on a board without ssh.")] = None
    result: Annotated[str | Path | None, _file("Read what that script printed.")] = None
    bench: Annotated[str | None, Option(help="Path of llama-bench on the board.", metavar="PATH")] = None
    device: Annotated[
        str | None,
        Option(help="Which device the board is (default: found by its own name).", metavar="NAME", complete="devices"),
    ] = None
    ssh_config: Annotated[str | Path | None, _file("ssh configuration to use instead of your own.")] = None
    context: Annotated[
        str | int | None,
        counts_tokens(
            "Measured here: context of each stream (default: serve.json's; else 2048, or the student's limit)."
        ),
    ] = None
    streams: Annotated[
        str | Sequence[int] | None,
        Option(
            help="Measured here: numbers of sequences decoded at once, like 1,4,16 (default: 1, and serve.json's).",
            metavar="N,...",
            parse=read_counts,
        ),
    ] = None
    prompt: Annotated[
        str | int | None, counts_tokens("Length of the prompt before the first token (default: 512).")
    ] = None
    decoded: Annotated[str | int | None, counts_tokens("Length of an answer (default: 64).")] = None
    rounds: Annotated[int | None, Option(help="Number of repetitions (default: 3).", metavar="N")] = None
    threads: Annotated[int, Option(help="CPU threads; 0 uses every core.", metavar="N", minimum=0)] = 0
    timeout: Annotated[
        str | float | None,
        Option(help="Stop waiting for a board after this long (default: 30m).", metavar="TIME", parse=parse_duration),
    ] = None
    blocks: Annotated[
        bool,
        Option(
            help="Time blocks of a model's dimensions in each storage type instead, for the limits of solve --latency."
        ),
    ] = False
    busy: Annotated[bool, Option(help="Measure even if the machine is busy, and mark the result.")] = False
    devices: Devices = None
    runs: Runs = RUNS
    cache: Cache = None

    def __post_init__(self) -> None:
        read_texts(self)
        if self.streams is not None:
            object.__setattr__(self, "streams", tuple(self.streams))
        given = [f"--{name}" for name in _OF_STUDENTS if self.blocks and getattr(self, name) not in (None, 0)]
        if given:
            raise InputError(
                f"--blocks times blocks in llama.cpp on this machine, with all of its cores: leave {given[0]} out"
            )
        places = {"--on": self.on, "--script": self.script, "--result": self.result}
        given = [name for name, place in places.items() if place is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} each say where it is measured: give one of them")
        place = given[0] if given else "here"
        for name, allowed in _PLACES.items():
            if getattr(self, name) not in (None, False) and place not in allowed:
                where = place if place == "here" else f"by {place}"
                raise InputError(f"--{name.replace('_', '-')} changes nothing in a measurement {where}: leave it out")
        for count in (1,) if self.streams is None else self.counts or (0,):
            check_streams(count, "--streams")
        # An answer has at least a first token and one that follows it.
        for name, least in (("context", 2), ("prompt", 1), ("decoded", 2), ("rounds", 1)):
            asked = getattr(self, name)
            if asked is not None and asked < least:
                raise InputError(f"--{name} must be at least {least}, not {asked}")

    @property
    def path(self) -> Path:
        """The student's file or folder."""
        return gguf_within(Path(self.student))

    @property
    def counts(self) -> tuple[int, ...]:
        """Requested numbers of sequences decoded at once. Empty if none was requested."""
        given = parsed(self.streams)
        return tuple(given or ())

    @property
    def own_devices(self) -> list[Path]:
        """Files with the user's own devices."""
        return [Path(file) for file in self.devices or ()]
