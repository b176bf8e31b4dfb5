"""Verifies an export against the evaluated student: the same weights on disk, and a loss like its in the runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from autodistill.errors import RuntimeDiffersError, VerificationError
from autodistill.export.base import PROMPT_TOKENS, Artifact, Expected, Exporter, NamesLayers, Ran, TakesAny
from autodistill.export.student_reader import StudentFiles
from autodistill.models.gguf_reader import read_gguf
from autodistill.quantization.grids import Floats
from autodistill.strategy.deployment import Deployment
from autodistill.units import with_error
from autodistill.utils.hashing import file_hash

LEAST_AGREEMENT = 0.5
"""Share of places at which the runtime must choose the evaluated student's token. A file with less is plainly broken.
Rounded activations and caches cost a correct file a few per cent, which says nothing of how well it predicts text."""
MOST_EXCESS = 0.2
"""Nats a token by which the runtime may lose more than the evaluated student. A file with more is plainly broken."""
POSITIONS = 2000
"""Number of places at which they are compared, if the data has enough."""


@runtime_checkable
class Rearranges(Protocol):
    """An exporter whose files may hold other tensors than transformers has: in other orders, parts or units."""

    def file_tensors(self, files: StudentFiles) -> Mapping[str, Callable[[], Floats]]:
        """Return the tensors that `unpack` yields of a student's artifact, each with a function for its values."""
        ...


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of comparing the weights on disk with those that were evaluated.

    Attributes:
        tensors: Number of stored tensors; all equal the evaluated ones.
        weights: Number of weights in them.
    """

    tensors: int
    weights: int


@dataclass(frozen=True, kw_only=True)
class RuntimeCheck:
    """The result of running an exported student in its runtime, beside the evaluated student on the same text.

    Attributes:
        agreement: Share of the places at which both choose the same token.
        positions: Number of places.
        loss: Mean negative log-likelihood of the text in the runtime, in nats a token. None if it reports none.
        excess, excess_stderr: That loss less the evaluated student's, and its standard error over sequences.
        text: What it wrote after the first tokens of the first sequence.
        same_cut: Share of tokens in these sequences' text that it makes as the student's tokenizer does; transformers
            runs that tokenizer itself.
        same_written: Number of written tokens, counted from the first, that equal the evaluated student's; None if not
            known.
        first_ms, tokens_per_second, cpu_ms, peak_bytes: As in `Pace`; None if that was not timed.
    """

    agreement: float
    positions: int
    text: str
    loss: float | None = None
    excess: float | None = None
    excess_stderr: float | None = None
    same_cut: float = 1.0
    same_written: int | None = None
    first_ms: float | None = None
    tokens_per_second: float | None = None
    cpu_ms: float | None = None
    peak_bytes: int | None = None

    def describe(self) -> str:
        """Return what was found, as a clause."""
        said = f"the evaluated student's token at {self.agreement:.2%} of {self.positions:,} places"
        if self.loss is None or self.excess is None:
            return said
        more = with_error(self.excess, self.excess_stderr, "+.4f")
        return f"{said}, and a loss of {self.loss:.4f} nats a token ({more})"


def verify(exporter: Exporter, artifact: Artifact, student: Path, deployment: Deployment) -> Verification:
    """Compare every weight read back from an artifact with the weights that were evaluated.

    Args:
        exporter: The exporter that wrote the artifact.
        artifact: The artifact.
        student: The folder of float32 weights from which it was made.
        deployment: How it had to be packed.

    Raises:
        VerificationError: A tensor is missing, surplus, or differs in any weight.
    """
    if deployment.file is not None:
        return _same_file(artifact.path, deployment.file.sha256)
    weights, seen = 0, set()
    with StudentFiles(student, deployment) as files:
        held = exporter.file_tensors(files) if isinstance(exporter, Rearranges) else held_as_in_transformers(files)
        for name, found in exporter.unpack(artifact.path):
            if name not in held or name in seen:
                raise VerificationError(f"{artifact.path} holds a tensor too many: {name}")
            _compare(name, found, held[name]())
            seen.add(name)
            weights += found.size
        missing = sorted(set(held) - seen)
    if missing:
        raise VerificationError(f"{artifact.path} lacks {len(missing)} tensors, {missing[0]} among them")
    return Verification(tensors=len(seen), weights=weights)


def _same_file(path: Path, sha256: str) -> Verification:
    """Compare a copy of a file with the file's hash."""
    if file_hash(path) != sha256:
        raise VerificationError(f"{path} is not a copy of the file that was evaluated: its SHA-256 is another one")
    tensors = read_gguf(path).tensors
    return Verification(tensors=len(tensors), weights=sum(math.prod(one.shape) for one in tensors))


def held_as_in_transformers(files: StudentFiles) -> dict[str, Callable[[], Floats]]:
    """Return the student's own tensors, each with a function for its values after storage."""
    return {name: partial(files.deployed, name) for name in files.specs}


def _compare(name: str, found: Floats, expected: Floats) -> None:
    if found.shape != expected.shape:
        raise VerificationError(f"{name} was exported as {list(found.shape)}, not as {list(expected.shape)}")
    if not np.array_equal(found, expected):
        differs = found != expected
        largest = float(np.abs(found - expected)[differs].max())
        raise VerificationError(
            f"{name} differs from the evaluated weights in {int(differs.sum())} of {found.size}, by up to {largest:.3g}"
        )


def prove(
    exporter: Exporter,
    path: Path,
    deployment: Deployment,
    expected: Expected,
    threads: int,
    student: Path,
    weights: Verification | None = None,
) -> RuntimeCheck:
    """Run an export and compare it with the evaluated student.

    `verify` has already compared its weights one by one. This asks whether the runtime computes from them what was
    evaluated. A wrong layout, rotation or norm spoils most places. How much a correct file loses by rounded activations
    is measured, not judged: the runtime's loss is what a row promises.

    Args:
        exporter: The exporter that wrote and runs the files. It runs a folder for vLLM in transformers.
        path: The exported file or folder.
        deployment: How it was packed, and what serves it.
        expected: Outputs of the evaluated student, computed in float32 from the packed weights.
        threads, student: As for `Exporter.run`.
        weights: The result of comparing the weights of these files, which an error then mentions.

    Raises:
        RuntimeDiffersError: The runtime chooses other tokens at half of the places, or loses 0.2 nats a token more.
        VerificationError: The runtime does not load the student, does not write, or tokenises text differently.
        ValueError: There are no places, or they belong to other sequences than those simulated.
    """
    return compare(
        exporter.run(path, expected.sequences, threads, student, deployment),
        exporter,
        path,
        deployment,
        expected,
        student,
        weights,
    )


def compare(
    ran: Ran,
    exporter: Exporter,
    path: Path,
    deployment: Deployment,
    expected: Expected,
    student: Path,
    weights: Verification | None = None,
) -> RuntimeCheck:
    """Compare what an export did with the evaluated student; see `prove`. It may have read more sequences."""
    count, length = expected.sequences.shape
    shape = (count, length - 1)
    if not expected.top1.size or expected.top1.shape != shape or expected.nll.shape != shape:
        raise ValueError(f"{[count, length]} tokens, and choices of {list(expected.top1.shape)}")
    if len(ran.top1) < count or ran.top1.shape[1:] != shape[1:]:
        raise ValueError(f"{exporter.name} ran {[count, length]} tokens, and gives choices of {list(ran.top1.shape)}")
    agreement = float((ran.top1[:count] == expected.top1).mean())
    loss = excess = stderr = None
    if ran.nll is not None:
        gaps = (ran.nll[:count] - expected.nll).mean(axis=1)
        loss, excess = float(ran.nll[:count].mean()), float(gaps.mean())
        stderr = float(gaps.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    if agreement < LEAST_AGREEMENT or (excess is not None and not excess <= MOST_EXCESS):
        runtime = exporter.runs_in if isinstance(exporter, TakesAny) else deployment.runtime
        lost = "" if excess is None else f", and loses {excess:+.3g} nats a token more"
        said = (
            f"{path} chose the evaluated student's token at {agreement:.1%} of {expected.top1.size} places in "
            f"{runtime}{lost}"
        )
        if weights is not None:
            said += (
                f"; all {weights.tensors} stored tensors are equal to what was evaluated, so the file is right, and "
                f"{runtime} computes something else from it"
            )
        if weights is not None and isinstance(exporter, NamesLayers):
            prompt = expected.sequences[0, :PROMPT_TOKENS]
            said += f": {exporter.first_difference(path, prompt, student, deployment)}"
        raise RuntimeDiffersError(said)
    return RuntimeCheck(
        agreement=agreement,
        positions=expected.top1.size,
        loss=loss,
        excess=excess,
        excess_stderr=stderr,
        text=ran.text,
        same_cut=ran.same_cut,
        same_written=_same_written(expected.written, ran.written),
        **({} if ran.pace is None else ran.pace._asdict()),
    )


def _same_written(expected: tuple[int, ...], written: tuple[int, ...]) -> int | None:
    if not expected or not written:
        return None
    pairs = zip(expected, written, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
