"""Verifies an export against the evaluated student: the same weights on disk, the same choices in its runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from autodistill.errors import RuntimeDiffersError, VerificationError
from autodistill.evaluation.statistics import binomial_interval, binomial_tail
from autodistill.export.base import PROMPT_TOKENS, Artifact, Expected, Exporter, NamesLayers, Ran, TakesAny, TokenIds
from autodistill.export.student_reader import StudentFiles
from autodistill.models.gguf_reader import read_gguf
from autodistill.quantization.grids import Floats
from autodistill.strategy.deployment import Deployment
from autodistill.utils.hashing import file_hash

MIN_AGREEMENT = 0.97
"""Least share of the clear positions at which the runtime must choose the simulation's token."""
CLEAR_SHARE = 0.8
"""Share of positions that count as clear: those where the simulation's choice leads by most. llama.cpp quantises
activations on CPUs, so near-ties may go either way by design. They are reported, but prove nothing."""
POSITIONS = 2000
"""Number of positions that are compared, if the data has enough."""
ENOUGH_POSITIONS = 500
"""From this number on, a share is compared directly with its limit. With fewer, `falls_short` tests significance."""

MAX_DIVERGENCE = 0.01
"""Largest allowed mean divergence in nats of a runtime that reports probabilities from the evaluated student.

It is not applied where llama.cpp rounds activations to 8 bits: how much that costs a correct file depends on the model.
"""
_LEAST_REST = 1e-6  # probability that float32 sums cannot tell from zero
_FALSE_REFUSAL_RATE = 0.005  # of refusing an export whose true share meets the limit, if positions are few


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
    """The result of running an exported student in its runtime.

    Attributes:
        agreement: Share of the clear positions at which it chose the simulation's token. This is the share that must
            reach the limit.
        raw_agreement: The same share over all positions, including near-ties.
        positions: Number of clear positions.
        interval: Confidence interval (95%) of the true share behind `agreement`: Clopper and Pearson's interval for
            independent positions. It is wide if there are few.
        text: What it wrote after the first tokens of the first sequence.
        same_cut: Share of tokens in these sequences' text that it makes as the student's tokenizer does; transformers
            runs that tokenizer itself.
        divergence: Mean KL from the evaluated student in nats. Outcomes are the tokens among the likeliest of both, and
            the remainder as one. None if one of the two does not report probabilities.
        same_written: Number of written tokens, counted from the first, that equal the evaluated student's; None if not
            known.
        first_ms, tokens_per_second, cpu_ms, peak_bytes: As in `Pace`; None if that was not timed.
    """

    agreement: float
    raw_agreement: float
    positions: int
    interval: tuple[float, float]
    text: str
    same_cut: float = 1.0
    divergence: float | None = None
    same_written: int | None = None
    first_ms: float | None = None
    tokens_per_second: float | None = None
    cpu_ms: float | None = None
    peak_bytes: int | None = None


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


def verify_runtime(
    exporter: Exporter,
    artifact: Artifact,
    deployment: Deployment,
    simulated: tuple[TokenIds, npt.NDArray[np.floating[Any]]],
    sequences: TokenIds,
    threads: int,
    student: Path,
) -> RuntimeCheck:
    """Load an artifact in its runtime, compare its choices with the simulation's, and let it write.

    `verify` has already compared its weights one by one. This check asks whether the runtime uses them to compute what
    was evaluated. A wrong layout, rotation or norm spoils most positions. Small data has few positions, so
    `falls_short` allows more misses. Thus a correct export is not refused for one or two near-ties, and one that is
    wrong at most positions is still found. An error rate of a few per cent shows only with many positions, so the
    record has their number and the interval.

    Args:
        exporter: The exporter that wrote and runs the artifact. It runs a folder for vLLM in transformers.
        artifact: The exported file or folder.
        deployment: How it was packed, and what serves it.
        simulated: int and float [sequences, tokens], the most likely next token after each token of each sequence, and
            the lead of its logit. They are computed in float32 from the packed weights.
        sequences: int [sequences, tokens].
        threads, student: As for `Exporter.run`.

    Raises:
        VerificationError: Agreement at the clear positions is below 97%, or the runtime does not load the student, does
            not write, or tokenises text differently.
        ValueError: There are no positions, or they belong to other sequences than those simulated.
    """
    return prove(exporter, artifact.path, deployment, Expected(sequences, *simulated), threads, student)


def prove(
    exporter: Exporter,
    path: Path,
    deployment: Deployment,
    expected: Expected,
    threads: int,
    student: Path,
    weights: Verification | None = None,
) -> RuntimeCheck:
    """Prove an export in its runtime as `verify_runtime` does, given all outputs of the evaluated student.

    Args:
        exporter, deployment, threads, student: As for `verify_runtime`.
        path: The exported file or folder.
        expected: Outputs of the evaluated student.
        weights: The result of comparing the weights of these files, which an error then mentions.

    Raises:
        VerificationError: As by `verify_runtime`, or probabilities differ by more than 0.01 nats and activations are
            not rounded.
        ValueError: As by `verify_runtime`.
    """
    top1, leads, sequences = expected.top1, expected.leads, expected.sequences
    if not top1.size or sequences.shape != top1.shape or leads.shape != top1.shape:
        raise ValueError(f"{list(sequences.shape)} tokens, and choices of {list(top1.shape)}")
    runtime = exporter.runs_in if isinstance(exporter, TakesAny) else deployment.runtime
    clear = leads >= np.quantile(leads, 1 - CLEAR_SHARE)
    ran = exporter.run(path, sequences, threads, student, deployment)
    if ran.top1.shape != top1.shape:
        raise ValueError(
            f"{exporter.name} ran {list(sequences.shape)} tokens, and gives choices of {list(ran.top1.shape)}"
        )
    same = ran.top1 == top1
    alike, positions = int(same[clear].sum()), int(clear.sum())

    def where() -> str:
        """Return what is known about the cause of a deviation, for a message."""
        if weights is None:
            return ""
        said = (
            f"; all {weights.tensors} stored tensors are equal to what was evaluated, so the file is right, and "
            f"{runtime} computes something else from it"
        )
        if isinstance(exporter, NamesLayers):
            said += f": {exporter.first_difference(path, sequences[0, :PROMPT_TOKENS], student, deployment)}"
        return said

    if falls_short(alike, positions, MIN_AGREEMENT):
        raise RuntimeDiffersError(
            f"{path} chose the evaluated student's token in {alike / positions:.1%} of {positions} clear "
            f"positions in {runtime}; {MIN_AGREEMENT:.0%} is the least{where()}"
        )
    away = divergence(expected, ran)
    if away is not None and not _rounds_activations(runtime, deployment) and not away <= MAX_DIVERGENCE:
        raise RuntimeDiffersError(
            f"{path} is {away:.3g} nats away from the evaluated student in {runtime}; "
            f"{MAX_DIVERGENCE} is the most{where()}"
        )
    return RuntimeCheck(
        agreement=alike / positions,
        raw_agreement=float(same.mean()),
        positions=positions,
        interval=binomial_interval(alike, positions),
        text=ran.text,
        same_cut=ran.same_cut,
        divergence=away,
        same_written=_same_written(expected.written, ran.written),
        **({} if ran.pace is None else ran.pace._asdict()),
    )


def divergence(expected: Expected, ran: Ran) -> float | None:
    """Return the mean KL in nats from the expected outputs to those of the run; see `RuntimeCheck.divergence`."""
    if expected.likeliest is None or ran.likeliest is None:
        return None
    (tokens, ours), (others, theirs) = expected.likeliest, ran.likeliest
    total = 0.0
    for place in np.ndindex(tokens.shape[:2]):
        _, here, there = np.intersect1d(tokens[place], others[place], return_indices=True)
        p, q = ours[place][here].astype(np.float64), theirs[place][there].astype(np.float64)
        rest, other = (max(0.0, 1 - float(np.exp(part).sum())) for part in (p, q))
        total += float((np.exp(p) * (p - q)).sum())
        # If float32 leaves no remainder to either, there is nothing to compare.
        if rest > _LEAST_REST:
            total += rest * float(np.log(rest / max(other, _LEAST_REST)))
    return max(0.0, total / (tokens.shape[0] * tokens.shape[1]))


def _rounds_activations(runtime: str, deployment: Deployment) -> bool:
    """Return whether the runtime rounds what it multiplies by quantised matrices, keys or values."""
    narrow = deployment.bits < 16 or bool(deployment.types) or deployment.cache_types != ("f16", "f16")
    return runtime == "llama.cpp" and narrow


def _same_written(expected: tuple[int, ...], written: tuple[int, ...]) -> int | None:
    if not expected or not written:
        return None
    pairs = zip(expected, written, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def falls_short(hits: int, count: int, minimum: float) -> bool:
    """Return whether a number of hits is significantly below the least share.

    With 500 observations or more, the share itself decides. With fewer, one miss may be a large share and mean nothing.
    The number then falls short if so few hits, or fewer, would occur less than once in 200 times at the least share.
    This is an exact binomial test for independent observations. At 97%, the limit is 16 hits of 20 positions, and 2
    hits of 5.
    """
    if count >= ENOUGH_POSITIONS:
        return hits < minimum * count
    return binomial_tail(hits, count, minimum) < _FALSE_REFUSAL_RATE
