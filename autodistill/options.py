"""Declarations of options, shared by the command line and the Python API."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, TypeVar

from autodistill.errors import InputError
from autodistill.hardware.budget import LatencyLimit, parse_latency
from autodistill.units import MOST_CONTEXT, parse_bytes, parse_duration, parse_tokens
from autodistill.utils.plain_dataclass import check_no_blank, hints_of

T = TypeVar("T")
DEFAULT_TEACHER, DEFAULT_DATA = "smollm2", "pydoc"
_MOST_TOKENS = 10**16  # far above any sensible value
RUNS = Path("results/runs")
"""Default folder of the runs."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of the command line, declared in the `Annotated` type of a parameter or a field.

    Its name, default and Python type are those of the parameter.

    Attributes:
        help: Help text.
        metavar: Placeholder for its value in the help.
        typed: The type that the command line reads: str, int, float, Path, bool (a flag), a Literal, or list[...]
            (repeatable). By default the Python type if that is only int, float or bool, otherwise str.
        parse: Reads a text, also one given in Python. The request then holds the result. For an int, the command line
            calls it at once, so that an error message names the option.
        complete: What a shell completes: "runs", "devices", "spaces", "strategies" or "formats".
        section: Heading in the help.
        minimum, maximum: The smallest and the largest number allowed.
        argument: Whether it is positional.
        required: Whether the command line requires it, although the request does not.
        python: Whether it exists only in Python, because its value is an object.
        commands: The commands that have it, if several share a request. Empty means all.
        helps: Other help texts, by command.
    """

    help: str
    metavar: str | None = None
    typed: Any = None
    parse: Callable[[str], Any] | None = None
    complete: str = ""
    section: str = ""
    minimum: int | None = None
    maximum: int | None = None
    argument: bool = False
    required: bool = False
    python: bool = False
    commands: tuple[str, ...] = ()
    helps: Mapping[str, str] = field(default_factory=dict)


def option_of(hint: Any) -> Option | None:
    """Return the option that a parameter's type declares, or None."""
    return next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Option)), None)


def options_of(declared: Any, command: str = "") -> Mapping[str, Option]:
    """Return the options that the parameters of a function or the fields of a dataclass declare.

    Args:
        declared: The function or the dataclass.
        command: If given, return only the options of this command.
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
    """Replace each text in a request's fields by the value that its option reads from it.

    Raises:
        InputError: A value is of another type, a text is blank or cannot be read, or a number is out of bounds.
    """
    check_no_blank(request)
    hints = hints_of(type(request))
    for name, option in options_of(type(request)).items():
        value = _of_type(name, hints[name], getattr(request, name))
        if option.parse is not None and isinstance(value, str):
            value = option.parse(value)
        object.__setattr__(request, name, value)
        if isinstance(value, int | float) and (bound := _broken(option, value)):
            raise InputError(f"--{name.replace('_', '-')} must be {bound}, not {value}")


_IN_WORDS = {str: "a text", Path: "a path", int: "a whole number", float: "a number", bool: "True or False"}


def _of_type(name: str, hint: Any, value: Any) -> Any:
    """Return a value, which may come from Python, as one of the types of its field.

    A whole number like 8e9, or one of numpy, becomes an int. A single text becomes a list where the field is a list.

    Raises:
        InputError: The value is of no type of the field.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    allowed = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if typing.Literal in allowed:  # its own check names the choices
        return value
    if isinstance(value, str | Path) and Sequence in allowed and str not in allowed:
        return (value,)
    # Python takes True for the number 1.
    wrong = isinstance(value, bool) and not {bool, object} & {*allowed}
    if not wrong and isinstance(value, (*allowed, int) if float in allowed else allowed):
        return value
    if not wrong and int in allowed and isinstance(value, float | Integral) and value == value // 1:
        return int(value)
    words = [_IN_WORDS.get(one, "a list" if one is Sequence else f"a {one.__name__}") for one in allowed]
    told = " or ".join(word for word, one in zip(words, allowed, strict=True) if one is not types.NoneType)
    raise InputError(f"{name} is of type {type(value).__name__}: give {told}")


def _broken(option: Option, value: float) -> str:
    """Return the bound that a number breaks, in words. Empty if it is within bounds."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if option.parse in (parse_bytes, parse_duration) and value <= 0:
        return "above zero"
    if option.minimum is not None and value < option.minimum:
        return f"at least {option.minimum}"
    return f"at most {option.maximum:,}" if option.maximum is not None and value > option.maximum else ""


def counts_tokens(help: str, *, minimum: int | None = None, maximum: int = _MOST_TOKENS, section: str = "") -> Option:
    """Return an option for a number of tokens. In Python it is a number or a text like "6k"."""
    return Option(
        help=help, metavar="TOKENS", typed=int, parse=parse_tokens, minimum=minimum, maximum=maximum, section=section
    )


def parsed(value: str | T) -> T:
    """Return the value of a field that `Option.parse` has already read."""
    assert not isinstance(value, str)
    return value


def cache_folder(folder: str | Path | None = None) -> Path:
    """Return the folder of `--cache`. It holds teachers, prepared data and this machine's measurement, for all runs."""
    return Path.home() / ".cache" / "autodistill" if folder is None else Path(folder)


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
        maximum=MOST_CONTEXT,
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
Moved = Annotated[str | Path | None, Option(help="Where the run's teacher is now, if it was moved.", metavar="REF")]
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
