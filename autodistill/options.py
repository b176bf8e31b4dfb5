"""One declaration of an option, from which the command line and the Python API both take it."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from autodistill.errors import InputError
from autodistill.hardware.budget import LatencyLimit, parse_latency
from autodistill.units import MOST_CONTEXT, parse_tokens
from autodistill.utils.plain_dataclass import check_no_blank

T = TypeVar("T")
DEFAULT_TEACHER, DEFAULT_DATA = "smollm2", "pydoc"
_MOST_TOKENS = 10**16  # beyond all reason
RUNS = Path("results/runs")
"""Where runs are, unless a person says so."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What an argument is on the command line; it stands in the `Annotated` type of a parameter or of a field.

    Its name, its default and its type in Python are those of the parameter.

    Attributes:
        help: What it does, for a person.
        metavar: What stands for its value in the help.
        typed: What the command line reads: str, int, float, Path, bool (a flag), a Literal, list[...] (repeatable). By
            default the type in Python, where that is int, float or bool alone, or else str.
        parse: Reads a text, also where Python gives one; the request then holds what it returns. Of an int the command
            line reads it at once, so that what is wrong with it is said with the option's name.
        complete: What a shell offers: "runs", "devices", "spaces", "strategies" or "formats".
        section: Heading of the help under which it is shown.
        least, most: The smallest and the largest number.
        argument: Whether it is given by its place instead of by its name.
        required: Whether a command line must have it, though the request can do without.
        python: Whether it is for Python alone: an object that no command line can say.
        commands: Those that have it, of several that share a request; all where there are none.
        helps: Another help text, by command.
    """

    help: str
    metavar: str | None = None
    typed: Any = None
    parse: Callable[[str], Any] | None = None
    complete: str = ""
    section: str = ""
    least: int | None = None
    most: int | None = None
    argument: bool = False
    required: bool = False
    python: bool = False
    commands: tuple[str, ...] = ()
    helps: Mapping[str, str] = field(default_factory=dict)


def option_of(hint: Any) -> Option | None:
    """The option that a parameter's type declares, if it does."""
    return next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Option)), None)


def options_of(declared: Any, command: str = "") -> Mapping[str, Option]:
    """The options that the parameters of a function, or the fields of a dataclass, declare.

    Args:
        declared: The function or the dataclass.
        command: Only those of this command.
    """
    found = _options(declared)
    return {name: one for name, one in found.items() if not (command and one.commands) or command in one.commands}


@cache
def _options(declared: Any) -> dict[str, Option]:
    hints = typing.get_type_hints(declared, include_extras=True)
    found = {name: (hint, option) for name, hint in hints.items() if (option := option_of(hint)) is not None}
    return {name: replace(one, typed=one.typed or _typed(hint)) for name, (hint, one) in found.items()}


def _typed(hint: Any) -> Any:
    kinds = {*typing.get_args(hint.__origin__), hint.__origin__} - {type(None)}
    return next((kind for kind in (int, float, bool) if kind in kinds and str not in kinds), str)


def read_texts(request: Any) -> None:
    """Replace each text among a request's fields by what its option reads from it.

    Raises:
        InputError: A blank text, one that the option does not read, or a number beyond its bounds.
    """
    check_no_blank(request)
    for name, option in options_of(type(request)).items():
        value = getattr(request, name)
        if option.parse is not None and isinstance(value, str):
            value = option.parse(value)
            object.__setattr__(request, name, value)
        if isinstance(value, int | float) and (bound := _broken(option, value)):
            raise InputError(f"--{name.replace('_', '-')} must be {bound}, not {value}")


def _broken(option: Option, value: float) -> str:
    """The bound that a number breaks; none for one within them."""
    if option.least is not None and value < option.least:
        return f"at least {option.least}"
    return f"at most {option.most:,}" if option.most is not None and value > option.most else ""


def counts_tokens(help: str, *, least: int | None = None, most: int = _MOST_TOKENS, section: str = "") -> Option:
    """An option that is a count of tokens, in Python as a number or as text like "6k"."""
    return Option(help=help, metavar="TOKENS", typed=int, parse=parse_tokens, least=least, most=most, section=section)


def parsed(value: str | T) -> T:
    """The value of a field that `Option.parse` has read."""
    assert not isinstance(value, str)
    return value


def cache_folder(given: str | Path | None = None) -> Path:
    """Return the folder of `--cache`: teachers, prepared data and this machine's measurement, for all runs."""
    return Path.home() / ".cache" / "autodistill" if given is None else Path(given)


LATENCY_HELP = (
    'Latency limit: 50ms for each token, or several in quotes, like "ttft_p95=300ms, tpot_p99=50ms @streams=16": the '
    "95th percentile of the time to the first token, the 99th of each later one, 16 sequences at once"
)
BUDGET_HELP = "Memory limit for the deployed student, like 16GB or 900MiB"

# Options that several commands share.
Latency = Annotated[
    str | tuple[LatencyLimit, ...] | None,
    Option(
        help=f"{LATENCY_HELP}. Applies to --device, or else to this machine.",
        metavar="LIMITS",
        parse=parse_latency,
        section="Budget",
    ),
]
Devices = Annotated[
    Sequence[str | Path] | None,
    Option(
        help="YAML file that describes your own devices. Repeatable.",
        metavar="FILE",
        typed=list[Path],
        section="Budget",
    ),
]
Context = Annotated[
    str | int | None,
    counts_tokens(
        "Context length the memory must cover (default: 2048, or the model's limit).",
        most=MOST_CONTEXT,
        section="Budget",
    ),
]
KvType = Annotated[
    str | None,
    Option(
        help="Type of llama.cpp's KV cache: f16, q8_0 or q4_0 (default: as the space says, else f16).",
        metavar="TYPE",
        section="Budget",
    ),
]
ServedBy = Annotated[
    str | None,
    Option(
        help="Runtime that serves the students, like onnxruntime (default: as their deployments say).",
        metavar="NAME",
        section="Budget",
    ),
]
Batch = Annotated[
    int | None, Option(help="Number of sequences decoded at once (default: 1).", metavar="N", section="Budget")
]
TEACHER = Option(
    help="Teacher model: a transformers folder, a .gguf file, a hub id, or smollm2 (default).",
    metavar="REF",
    section="Model and data",
)
Runs = Annotated[str | Path, Option(help="Folder that holds the runs.", metavar="DIR", typed=Path, section="Run")]
ONE_RUN = Option(
    help="Name of the run, or its folder (default: the newest run).", metavar="RUN", argument=True, complete="runs"
)
EACH_RUN = Option(
    help="Names of runs, or their folders (default: all).",
    metavar="RUN",
    typed=list[str],
    argument=True,
    complete="runs",
)
Cache = Annotated[
    str | Path | None,
    Option(
        help="Folder for what later runs can reuse (default: ~/.cache/autodistill).",
        metavar="DIR",
        typed=Path,
        section="Storage",
    ),
]
Storage = Annotated[
    str | None,
    Option(
        help="Also keep events, checkpoints and students there: an s3://, gs:// or file:// address.",
        metavar="URI",
        section="Storage",
    ),
]
RayAddress = Annotated[
    str | None,
    Option(
        help="Join a running Ray cluster from one of its nodes, given as auto or as host:port.",
        metavar="ADDR",
        section="Workers",
    ),
]
