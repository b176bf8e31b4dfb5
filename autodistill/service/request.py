"""The requests of serving: their fields are the options of the command line and of Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from autodistill.advisor.measure_request import read_counts
from autodistill.errors import InputError
from autodistill.hardware.budget import LatencyLimit, check_streams, parse_latency
from autodistill.options import RUNS, Devices, Option, Runs, counts_tokens, parsed, read_texts
from autodistill.units import format_duration, parse_duration

_MOST_SECONDS, _MOST_STREAMS = 3600.0, 256
_DECODED = 64  # tokens
MARGIN = 0.25
"""Default share by which a figure without a limit may exceed the measured value."""

KeyFile = Annotated[
    str | Path | None,
    Option(help="File with the server's key (default: AUTODISTILL_API_KEY).", metavar="FILE", typed=Path),
]
"""The file from which a client reads its key."""


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """What is served, and how."""

    export: Annotated[
        str | Path,
        Option(
            help="A .gguf file, an exported folder, a run (by folder or name), or a row's id.",
            metavar="EXPORT",
            argument=True,
            complete="runs",
        ),
    ] = field(kw_only=False)
    row: Annotated[str | None, Option(help="Row of the run (default: what the run exported).", metavar="ID")] = None
    host: Annotated[
        str,
        Option(
            help="Address to listen on, or the path of a Unix socket that ends in .sock (default: 127.0.0.1).",
            metavar="HOST",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, Option(help="Port to listen on; 0 takes any free one (default: 8080).", metavar="N", minimum=0)
    ] = 8080
    public: Annotated[bool, Option(help="Allow a --host that other machines reach; needs --key-file.")] = False
    key_file: Annotated[
        str | Path | None,
        Option(
            help="Take the key from this file, or write a new one into it (default: a new one, printed once).",
            metavar="FILE",
            typed=Path,
        ),
    ] = None
    streams: Annotated[
        int | None,
        Option(help="Sequences at once (default: as exported).", metavar="N", minimum=1),
    ] = None
    context: Annotated[str | int | None, counts_tokens("Tokens of each sequence (default: as exported).")] = None
    threads: Annotated[int, Option(help="CPU threads; 0 uses every core.", metavar="N", minimum=0)] = 0
    draft: Annotated[
        str | Path | None,
        Option(
            help="A smaller student that proposes tokens which this one checks: a .gguf file, a run, or a row's id.",
            metavar="ROW|FILE",
        ),
    ] = None
    runs: Runs = RUNS

    def __post_init__(self) -> None:
        """Refuse options that no server can have."""
        read_texts(self)
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port must be 0 to 65535, not {self.port}")
        if self.public and (self.host == "127.0.0.1" or self.host.endswith(".sock")):
            raise InputError("--public changes nothing without a --host that other machines reach: leave it out")


@dataclass(frozen=True, kw_only=True)
class DraftsRequest:
    """Which students are tried as drafts of a model, and on which texts."""

    target: Annotated[
        str | Path,
        Option(
            help="The model that answers, such as the teacher: a .gguf file, an exported folder, a run, or a row's id.",
            metavar="TARGET",
            argument=True,
            complete="runs",
        ),
    ] = field(kw_only=False)
    drafts: Annotated[
        Sequence[str] | None,
        Option(
            help="Smaller students with the same tokenizer, given in the same form (default: show what is recorded).",
            metavar="DRAFT",
            typed=list[str],
            argument=True,
            complete="runs",
        ),
    ] = None
    text: Annotated[
        str,
        Option(
            help=(
                "Text with beginnings that the models continue: a file or folder (default: a text that comes with "
                "autodistill)."
            ),
            metavar="TEXT",
        ),
    ] = "packaged"
    prompts: Annotated[int, Option(help="Number of beginnings (default: 8).", metavar="N", minimum=1)] = 8
    prompt: Annotated[str | int, counts_tokens("Tokens of a beginning, at most (default: 48).", minimum=1)] = 48
    decoded: Annotated[str | int, counts_tokens("Tokens that continue it, at least 3 (default: 64).", minimum=1)] = 64
    time: Annotated[
        str | float, Option(help="Time for all of it (default: 10m; at most 1h).", metavar="TIME", parse=parse_duration)
    ] = "10m"
    threads: Annotated[int, Option(help="CPU threads; 0 uses every core.", metavar="N", minimum=0)] = 0
    runs: Runs = RUNS

    def __post_init__(self) -> None:
        """Refuse requests that could not give a draft's figures, or would not end."""
        read_texts(self)
        if not 0 < float(parsed(self.time) or 0) <= _MOST_SECONDS:
            raise InputError(f"--time must be above zero and at most {format_duration(_MOST_SECONDS)}")
        for name, least, most in (("prompts", 1, 1000), ("prompt", 1, 10**5), ("decoded", 3, 10**5)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"--{name} must be {least} to {most:,}, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """The load for a server, and where the results are stored."""

    url: Annotated[
        str, Option(help="Address of the server, like http://127.0.0.1:8080.", metavar="URL", argument=True)
    ] = field(kw_only=False)
    streams: Annotated[
        str | Sequence[int],
        Option(
            help="Numbers of sequences at once, in this order (default: 1,4,16).", metavar="N,...", parse=read_counts
        ),
    ] = "1,4,16"
    latency: Annotated[
        str | tuple[LatencyLimit, ...] | None,
        Option(
            help="Stop at the first number of sequences that breaks a limit, like ttft_p95=2s,tpot_p95=80ms.",
            metavar="LIMITS",
            parse=parse_latency,
        ),
    ] = None
    time: Annotated[
        str | float, Option(help="Time for all of it (default: 2m; at most 1h).", metavar="TIME", parse=parse_duration)
    ] = "2m"
    promise: Annotated[
        str | None,
        Option(
            help=(
                "Compare it with what was promised for this, with as many sequences as that is for: a .gguf file, an "
                "exported folder, a run, or a row's id."
            ),
            metavar="EXPORT",
            complete="runs",
        ),
    ] = None
    margin: Annotated[
        float | None,
        Option(
            help="Share by which a measured figure may be exceeded, if no limit was asked for (default: 0.25).",
            metavar="X",
        ),
    ] = None
    prompt: Annotated[
        str | int | None,
        counts_tokens(
            "Length of a prompt (default: 256, or the prompt length that the promise gives for the first token).",
            minimum=1,
        ),
    ] = None
    decoded: Annotated[str | int, counts_tokens("Length of an answer (default: 64).", minimum=2)] = _DECODED
    student: Annotated[
        str | Path | None,
        Option(
            help="The .gguf file or folder that it serves (default: what the server names, if that is here).",
            metavar="FILE",
            typed=Path,
            parse=Path,
        ),
    ] = None
    device: Annotated[
        str | None,
        Option(help="Device that the server is on (default: this machine).", metavar="NAME", complete="devices"),
    ] = None
    devices: Devices = None
    threads: Annotated[
        int, Option(help="CPU threads of the server; 0 if it uses every core.", metavar="N", minimum=0)
    ] = 0
    key_file: KeyFile = None
    runs: Runs = RUNS

    def __post_init__(self) -> None:
        """Refuse a load without an end."""
        read_texts(self)
        object.__setattr__(self, "streams", tuple(self.streams))
        for count in self.counts or (0,):
            if check_streams(count, "--streams") > _MOST_STREAMS:
                raise InputError(f"--streams has {count}, and at most {_MOST_STREAMS} sequences are sent at once")
        if not 0 < float(parsed(self.time) or 0) <= _MOST_SECONDS:
            raise InputError(f"--time must be above zero and at most {format_duration(_MOST_SECONDS)}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of sequences at once. One alone comes first, since predictions are corrected by its figures."""
        given = tuple(parsed(self.streams) or ())
        return given if not given or given[0] == 1 else (1, *given)
