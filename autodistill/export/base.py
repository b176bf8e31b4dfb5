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
from autodistill.export.promise import RECORD
from autodistill.hardware.runtime import Runtime
from autodistill.quantization.formats import Format
from autodistill.strategy.deployment import Deployment

TokenIds: TypeAlias = npt.NDArray[np.integer[Any]]
Nats: TypeAlias = npt.NDArray[np.floating[Any]]
PARTIAL = ".partial-"
"""Beginning of the name of a folder that is being written."""


class Label(TypedDict, total=False):
    """A student's name, its teacher, and the licence that it inherits, as far as they are known.

    An exporter writes them down if its container has a place for them.

    Attributes:
        teacher: Name of the student's teacher.
        license: Licence of the teacher.
        name: Name of the student; without one, it is called the student of its teacher.
    """

    teacher: str | None
    license: str | None
    name: str | None


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An exported student on disk.

    Attributes:
        path: The file that a runtime loads (GGUF), or the folder.
        size_bytes: Bytes of the files that hold weights.
    """

    path: Path
    size_bytes: int


class Pace(NamedTuple):
    """How fast an artifact wrote tokens, by the clock and on a possibly busy machine, and how much memory that took.

    Attributes:
        first_ms: Milliseconds from the first `PROMPT_TOKENS` to the first token.
        tokens_per_second: Rate of the tokens that follow the first one.
        cpu_ms: CPU time of each of these tokens in milliseconds, summed over threads.
        peak_bytes: Peak memory of the runtime's own process until then; None if the runtime has no process of its own.
    """

    first_ms: float
    tokens_per_second: float
    cpu_ms: float
    peak_bytes: int | None = None


class Ran(NamedTuple):
    """What an exported artifact chose, lost and wrote in its runtime.

    Attributes:
        top1: int [sequences, tokens - 1], the likeliest token at each place but the first of each sequence.
        nll: float [sequences, tokens - 1], negative log-likelihood in nats of the token that stands there. None if the
            runtime reports no probabilities.
        text: What it wrote after the first `PROMPT_TOKENS` of the first sequence, `WRITTEN_TOKENS` tokens long.
        same_cut: Share of tokens in the sequences' text that the runtime's tokenizer makes as the student's does; 1 if
            the runtime uses the student's tokenizer.
        written: The tokens of `text`; () if they are not known.
        pace: How fast it wrote them; None if that was not timed.
    """

    top1: TokenIds
    nll: Nats | None
    text: str
    same_cut: float = 1.0
    written: tuple[int, ...] = ()
    pace: Pace | None = None


class Expected(NamedTuple):
    """Outputs of the evaluated student, computed by torch in float32 from the packed weights.

    Attributes:
        sequences: int [sequences, tokens], the sequences that it read; at least two tokens each.
        top1, nll, written: As in `Ran`.
        leads: float [sequences, tokens - 1], by how much the likeliest token's logit leads the next one's.
    """

    sequences: TokenIds
    top1: TokenIds
    nll: Nats
    leads: Nats
    written: tuple[int, ...] = ()


PROMPT_TOKENS, WRITTEN_TOKENS = 8, 64
"""Tokens of the first sequence that are read, and tokens that are written after them."""


class Exporter(Protocol):
    """Writes students in one container: one file and one entry point of the group `autodistill.exporters`.

    It is constructed without arguments. The rest of the project needs no other change: it asks the exporter what the
    exporter can hold, how this is verified and what serves it.

    Attributes:
        name: Name of the entry point, and of the container of its formats.
        formats: Each way to pack a model in this container, with the runtimes that serve it. () if the exporter has no
            formats of its own, and stores whatever a row was evaluated as: see `TakesAny`.
        runtimes: Those of these runtimes that this project does not know, with their memory and speed; () if it knows
            all.
    """

    name: str
    formats: tuple[Format, ...]
    runtimes: tuple[Runtime, ...]

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Pack `student`, a transformers folder of a student or of the teacher itself, into the folder `out`."""
        ...

    def unpack(self, artifact: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Yield each stored tensor by transformers' name, dequantised from the bytes on disk."""
        ...

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Let an artifact read text and write a little in its runtime. This is what judges it.

        Args:
            artifact: The exported file or folder.
            sequences: int [sequences, tokens], at least two tokens each.
            threads: CPU threads of the runtime. Next to other work, one thread is the fastest in llama.cpp.
            student: The folder that the artifact was made from, which has the tokenizer. If it is not available, this
                is the artifact's own folder, and the runtime's tokens of text are not compared.
            deployment: How it was packed, and the types of the KV cache.

        Raises:
            VerificationError: The artifact cannot be loaded, does not write, or its runtime tokenises text differently.
        """
        ...


@runtime_checkable
class NamesLayers(Protocol):
    """An exporter whose runtime shows what each layer computes, so that a deviation can be located."""

    def first_difference(self, artifact: Path, tokens: TokenIds, student: Path, deployment: Deployment) -> str:
        """Return in words where the runtime begins to differ from the evaluated student; "" if it does not.

        Args:
            artifact, student, deployment: As for `Exporter.run`; `student` has the weights.
            tokens: int [tokens], a short text.
        """
        ...


@runtime_checkable
class TakesAny(Exporter, Protocol):
    """An exporter without formats of its own: it stores the weights of the deployment that a row was evaluated under.

    Attributes:
        runs_in: The runtime of its files, in words.
        is_code: Whether loading its files runs code that they contain.
        packages: Packages needed to write and run the files, in addition to what this project always installs.
        notes: Further entries of its record.
    """

    runs_in: str
    is_code: bool
    packages: tuple[str, ...]
    notes: Mapping[str, Any]

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Return why it cannot hold this student, with the first tensor or layer and what can hold it, or ""."""
        ...


def check_written(path: Path, count: int, requested: int = WRITTEN_TOKENS) -> None:
    """Refuse an artifact that did not write as many tokens as requested.

    Raises:
        VerificationError: It wrote fewer or more.
    """
    if count != requested:
        raise VerificationError(f"{path} wrote {count} tokens of the {requested} that it was asked for")


def check_containers(names: Sequence[str], out: Path) -> None:
    """Refuse exports that cannot be written, by names and folders alone. Loading exporters would take seconds.

    Args:
        names: Names of exporters.
        out: Folder in which each exporter gets a folder of its name.

    Raises:
        InputError: A name is missing, unknown or repeated, or a folder exists and is neither empty nor an export.
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
        # The next export removes what an interrupted one may have left, and keeps one that is already as it should be.
        if folder.exists() and not (
            folder.is_dir()
            and ((folder / RECORD).is_file() or all(one.name.startswith(PARTIAL) for one in folder.iterdir()))
        ):
            raise InputError(f"{folder} exists and is not an empty folder: choose another one with --out")


def load_exporter(name: str) -> Exporter:
    """Create the installed exporter with a name.

    Raises:
        InputError: As by `plugins.load`.
    """
    made: Exporter = plugins.load("exporters", name)
    return made
