"""The protocol of exporters, which write a student in one container, read it back and run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict, Unpack, runtime_checkable

import numpy as np
import numpy.typing as npt

from autodistill import plugins
from autodistill.errors import InputError, VerificationError
from autodistill.hardware.runtime import Runtime
from autodistill.quantization.formats import Format
from autodistill.strategy.deployment import Deployment

TokenIds: TypeAlias = npt.NDArray[np.integer[Any]]
PARTIAL = ".partial-"
"""What the name of a folder begins with that is being written."""


class Label(TypedDict, total=False):
    """What a student is called, what it is of, and the licence that it inherits, as far as they are known.

    An exporter writes them down where its container has a place for them.

    Attributes:
        teacher: Name of the model that it is of.
        license: Of the teacher.
        name: Of the student; where it has none it is called the student of its teacher.
    """

    teacher: str | None
    license: str | None
    name: str | None


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An exported student on disk.

    Attributes:
        path: The file a runtime is given (GGUF), or the folder.
        size_bytes: Bytes of the files that hold weights.
    """

    path: Path
    size_bytes: int


class Pace(NamedTuple):
    """How fast an artifact wrote, by the clock, with whatever else the machine did; and what memory that took.

    Attributes:
        first_ms: Milliseconds from the first `PROMPT_TOKENS` to the first token.
        tokens_per_second: Of those that follow it.
        cpu_ms: Milliseconds of CPU that each of those took, of all threads together.
        peak_bytes: Peak memory of the runtime's own process until then; None where it has none of its own.
    """

    first_ms: float
    tokens_per_second: float
    cpu_ms: float
    peak_bytes: int | None = None


class Ran(NamedTuple):
    """The tokens that an exported artifact chose and wrote in its runtime.

    Attributes:
        top1: int [sequences, tokens], the token that it finds likeliest after each token of each sequence.
        text: What it wrote after the first `PROMPT_TOKENS` of the first sequence, `WRITTEN_TOKENS` tokens long.
        same_cut: Share of the tokens of the sequences' text that the runtime cuts it into as the student's tokenizer
            does; 1 where the runtime has that tokenizer itself.
        likeliest: Tokens and log-probabilities, int and float [sequences, tokens, some], of the likeliest after each,
            best first; None where the runtime does not tell them.
        written: The tokens of `text`; () where they are not known.
        pace: How fast it wrote them; None where that was not timed.
    """

    top1: TokenIds
    text: str
    same_cut: float = 1.0
    likeliest: tuple[TokenIds, npt.NDArray[np.floating[Any]]] | None = None
    written: tuple[int, ...] = ()
    pace: Pace | None = None


class Expected(NamedTuple):
    """What the evaluated student does, computed by torch in float32 from the packed weights.

    Attributes:
        sequences: int [sequences, tokens], what it read.
        top1, leads: int and float [sequences, tokens], the likeliest token after each, and the lead of its logit.
        likeliest: As in `Ran`; None where it was not kept.
        written: As in `Ran`.
    """

    sequences: TokenIds
    top1: TokenIds
    leads: npt.NDArray[np.floating[Any]]
    likeliest: tuple[TokenIds, npt.NDArray[np.floating[Any]]] | None = None
    written: tuple[int, ...] = ()


PROMPT_TOKENS, WRITTEN_TOKENS = 8, 64
"""Tokens of the first sequence that are read, and those that are written after them."""
KEPT_TOKENS = 64
"""Likeliest tokens of each place whose probabilities are kept."""


class Exporter(Protocol):
    """Writes students in one container: one file and one entry point of the group `autodistill.exporters`.

    It is constructed without arguments. Nothing else needs to know of it: what it holds, how that is verified and what
    serves it are asked of it.

    Attributes:
        name: As it is declared, and as the container of its formats is called.
        formats: What it holds: each way to pack a model in this container, with the runtimes that serve it. () where it
            has none of its own, and stores whatever a row was evaluated as: see `TakesAny`.
        runtimes: Those of these runtimes that this project does not know, with their memory and speed; else ().
    """

    name: str
    formats: tuple[Format, ...]
    runtimes: tuple[Runtime, ...]

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Pack `student`, a folder of transformers, into the folder `out`: a student's, or the teacher's own."""
        ...

    def unpack(self, artifact: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Yield each stored tensor by transformers' name, dequantised from the bytes on disk."""
        ...

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Run an artifact in its runtime, to compare it with the simulation of the same packed weights.

        Args:
            artifact: The exported file or folder.
            sequences: int [sequences, tokens].
            threads: CPU threads of the runtime. Beside other work, one is the fastest in llama.cpp.
            student: The folder that the artifact was made of; it has the tokenizer. Where that is not at hand it is the
                artifact's own folder, and of the text that is cut nothing is known.
            deployment: How it was packed; it also has the types of the KV cache.

        Raises:
            VerificationError: It cannot be loaded, does not write, or cuts text into other tokens.
        """
        ...


@runtime_checkable
class TakesAny(Exporter, Protocol):
    """An exporter without formats of its own: its weights are those of the deployment that a row was evaluated under.

    Attributes:
        runs_in: The runtime of what it writes, in words.
        is_code: Whether who loads its files runs code that is in them.
        packages: What is needed to write and run them, beside what this project always has.
        notes: What its record says of it besides.
    """

    runs_in: str
    is_code: bool
    packages: tuple[str, ...]
    notes: Mapping[str, Any]

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Return why it cannot hold a student so, with the first tensor or layer and what can hold it; else ""."""
        ...


def check_written(path: Path, count: int, asked: int = WRITTEN_TOKENS) -> None:
    """Refuse an artifact that did not write as many tokens as it was asked for.

    Raises:
        VerificationError: It wrote fewer, or more.
    """
    if count != asked:
        raise VerificationError(f"{path} wrote {count} tokens of the {asked} that it was asked for")


def check_containers(names: Sequence[str], out: Path) -> None:
    """Refuse what cannot be written, by names and places alone; no exporter is loaded, which takes seconds.

    Args:
        names: Of exporters.
        out: Folder in which each gets one of its name.

    Raises:
        InputError: No name, an unknown or repeated one, or a folder that is there and not empty.
    """
    known = plugins.names("exporters")
    listed = f"the formats are {', '.join(known)}"
    if not names:
        raise InputError(f"--to names no format; {listed}")
    for name in names:
        if name not in known:
            raise InputError(f"there is no format {name!r}; {listed}")
    if len(set(names)) < len(names):
        raise InputError(f"--to names a format twice: {', '.join(names)}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder with --out")
    for folder in (out / name for name in names):
        # What an interrupted export may have left is removed by the next one.
        if folder.exists() and not (folder.is_dir() and all(one.name.startswith(PARTIAL) for one in folder.iterdir())):
            raise InputError(f"{folder} exists and is not an empty folder: choose another one with --out")


def load_exporter(name: str) -> Exporter:
    """Make the installed exporter of a name.

    Raises:
        InputError: As `plugins.load`.
    """
    made: Exporter = plugins.load("exporters", name)
    return made
