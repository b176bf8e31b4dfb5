"""Verification of an export against what was evaluated: the same weights on disk, the same choices in its runtime."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.errors import RuntimeDiffersError, VerificationError
from autodistill.evaluation.statistics import binomial_interval, binomial_tail
from autodistill.export.base import Artifact, Expected, Exporter, Ran, TakesAny, TokenIds
from autodistill.export.student_reader import StudentFiles
from autodistill.quantization.grids import Floats
from autodistill.strategy.deployment import Deployment

MIN_AGREEMENT = 0.97
"""Least share of the clear positions at which the runtime must choose the simulation's token."""
CLEAR_SHARE = 0.8
"""Share of positions that count as clear: those where the simulation's choice leads by most. llama.cpp quantises
activations on CPUs, so that near-ties fall either way by design: they are reported, and prove nothing."""
POSITIONS = 2000
"""Positions that are compared where the data has as many."""
ENOUGH_POSITIONS = 500
"""From so many on a share is held to its limit as it is; of fewer it must be shown to lie below: `falls_short`."""

MAX_DIVERGENCE = 0.01
"""Most nats that a runtime which tells probabilities may be away from the evaluated student, on the average."""
_LEAST_REST = 1e-6  # of probability: what sums of float32 cannot tell from none
_CHANCE = 0.005  # of refusing an export whose true share is no less than the limit, where positions are few


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of comparing the weights on disk with those that were evaluated.

    Attributes:
        tensors: Stored tensors, all equal to what was evaluated.
        weights: Weights in them.
    """

    tensors: int
    weights: int


@dataclass(frozen=True, kw_only=True)
class RuntimeCheck:
    """The result of running an exported student in its runtime.

    Attributes:
        agreement: Share of the clear positions at which it chose the simulation's token; this is what is required.
        raw_agreement: The same over all positions, near-ties included.
        positions: Number of clear positions.
        interval: Between what the true share of `agreement` lies, with a confidence of 95%: Clopper and Pearson's
            interval of positions that are independent of each other. Few of them make it wide.
        text: What it wrote after the first tokens of the first sequence.
        same_cut: Share of the tokens of these sequences' text that it cuts as the student's tokenizer does, which
            transformers runs itself.
        divergence: Mean KL, in nats, of what ran from the evaluated student, over the tokens that are among the
            likeliest of both and the remainder as one; None where one of them does not tell probabilities.
        same_written: Of the tokens that it wrote, how many from the first on are those that the evaluated student
            writes; None where that is not known.
        first_ms, tokens_per_second, cpu_ms, peak_bytes: As `Pace` has them; None where that was not timed.
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
        exporter: The one that wrote the artifact.
        artifact: What it wrote.
        student: The folder of float32 weights that it was made of.
        deployment: How it was to be packed.

    Raises:
        VerificationError: A tensor is missing, surplus, or differs in any weight.
    """
    weights, seen = 0, set()
    with StudentFiles(student, deployment) as files:
        for name, found in exporter.unpack(artifact.path):
            if name not in files.specs or name in seen:
                raise VerificationError(f"{artifact.path} holds a tensor too many: {name}")
            _compare(name, found, files.deployed(name))
            seen.add(name)
            weights += found.size
        missing = sorted(set(files.specs) - seen)
    if missing:
        raise VerificationError(f"{artifact.path} lacks {len(missing)} tensors, {missing[0]} among them")
    return Verification(tensors=len(seen), weights=weights)


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

    Its weights were compared one by one already (`verify`): what is asked here is whether the runtime computes with
    them what was evaluated, which a wrong layout, rotation or norm spoils at most positions. Small data gives few
    positions, and they are held to less, by `falls_short`: a right export is not refused for a near-tie or two, and one
    that is wrong at most positions is still found. An error of a few in a hundred shows in many positions alone, so
    that the record has their count and interval.

    Args:
        exporter: The one that wrote the artifact, and runs it: a folder that vLLM will serve in transformers.
        artifact: The exported file or folder.
        deployment: How it was packed, and what serves it.
        simulated: int and float [sequences, tokens], the most likely next token after each token of each sequence and
            the lead of its logit, computed in float32 from the packed weights.
        sequences: int [sequences, tokens].
        threads, student: As `Exporter.run` takes them.

    Raises:
        VerificationError: Less than 97% agreement at the clear positions, a runtime that does not load the student or
            does not write, or one that cuts text into other tokens.
        ValueError: No positions, or those of other sequences than were simulated.
    """
    return prove(exporter, artifact.path, deployment, Expected(sequences, *simulated), threads, student)


def prove(
    exporter: Exporter, path: Path, deployment: Deployment, expected: Expected, threads: int, student: Path
) -> RuntimeCheck:
    """Prove an export in its runtime like `verify_runtime`, given all that the evaluated student does.

    Args:
        exporter, deployment, threads, student: As `verify_runtime` takes them.
        path: The exported file or folder.
        expected: What the evaluated student does.

    Raises:
        VerificationError: As `verify_runtime`; or probabilities that differ by more than 0.01 nats.
        ValueError: As `verify_runtime`.
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
    if falls_short(alike, positions, MIN_AGREEMENT):
        raise RuntimeDiffersError(
            f"{path} chose the evaluated student's token in {alike / positions:.1%} of {positions} clear "
            f"positions in {runtime}; {MIN_AGREEMENT:.0%} is the least"
        )
    away = divergence(expected, ran)
    if away is not None and not away <= MAX_DIVERGENCE:
        raise RuntimeDiffersError(
            f"{path} is {away:.3g} nats away from the evaluated student in {runtime}; {MAX_DIVERGENCE} is the most"
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
    """Return the mean KL in nats of what ran from what was expected; see `RuntimeCheck.divergence`."""
    if expected.likeliest is None or ran.likeliest is None:
        return None
    (tokens, ours), (others, theirs) = expected.likeliest, ran.likeliest
    total = 0.0
    for place in np.ndindex(tokens.shape[:2]):
        _, here, there = np.intersect1d(tokens[place], others[place], return_indices=True)
        p, q = ours[place][here].astype(np.float64), theirs[place][there].astype(np.float64)
        rest, other = (max(0.0, 1 - float(np.exp(part).sum())) for part in (p, q))
        total += float((np.exp(p) * (p - q)).sum())
        # Where float32 leaves no remainder to either, there is nothing to compare.
        if rest > _LEAST_REST:
            total += rest * float(np.log(rest / max(other, _LEAST_REST)))
    return max(0.0, total / (tokens.shape[0] * tokens.shape[1]))


def _same_written(expected: tuple[int, ...], written: tuple[int, ...]) -> int | None:
    if not expected or not written:
        return None
    pairs = zip(expected, written, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def falls_short(hits: int, count: int, least: float) -> bool:
    """Return whether what was found so often is less than it must be.

    From 500 observations on, the share itself says so. Of fewer, one miss may be a large share and tell nothing, so
    that it falls short where so few hits would come less than once in 200 times if the true share were the least: an
    exact binomial test of independent observations. Of 20 positions and 97% that is 16 hits or fewer, of 5 it is 2.
    """
    if count >= ENOUGH_POSITIONS:
        return hits < least * count
    return binomial_tail(hits, count, least) < _CHANCE
