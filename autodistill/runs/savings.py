"""Compute that a search saved: stages that another trial had trained, and trials that were rejected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autodistill.distillation.training.plan import Plan
from autodistill.runs.events import RunEvent, RungReached, StudentKept, TrialAdded, TrialEnded, WorkLost, of_kind
from autodistill.runs.results.row import Status
from autodistill.units import format_duration
from autodistill.utils.plain_dataclass import ToJson

# Operations per weight and token in training: two forward, four backward (Kaplan et al., 2020, arXiv:2001.08361).
_FLOPS = 6


@dataclass(frozen=True, kw_only=True)
class Saved(ToJson):
    """The training that a search did, and the training that it saved.

    Operations are estimated as six per weight and token. Seconds are those of one worker, at the measured rate of the
    run's training.

    Attributes:
        trained_tokens, trained_flops: The training of all trials, decays included. Failed or interrupted work counts as
            far as it was reported or left a checkpoint.
        trained_seconds: The time of the training that led to a result. If a trial used the threads of all workers, its
            time counts once for each worker.
        sharing: Number of trials that continued from what another trial had trained.
        shared_tokens, shared_flops, shared_seconds: The training that was saved by this sharing.
        rejected: Number of proposals that were rejected: no deployment fits, the training does not fit, or they
            contradict the teacher.
        rejected_tokens, rejected_flops, rejected_seconds: The saved training of rejected proposals up to the first
            rung. Only proposals that have a student are counted.
        without_student: Number of rejected proposals that have no student, since the teacher has no such shape.
    """

    trained_tokens: int
    trained_flops: float
    trained_seconds: float
    sharing: int
    shared_tokens: int
    shared_flops: float
    shared_seconds: float
    rejected: int
    rejected_tokens: int
    rejected_flops: float
    rejected_seconds: float
    without_student: int = 0

    def describe(self) -> tuple[str, ...]:
        """Return a sentence for each of the two kinds of savings, if there were any."""
        said = []
        if self.shared_tokens:
            said.append(
                f"{self.sharing} trial{'s' if self.sharing > 1 else ''} went on from stages that others had trained: "
                f"{_amount(self.shared_tokens, self.shared_flops, self.shared_seconds)} saved, "
                f"{self.trained_tokens:,} tokens trained, decays at rungs among them"
            )
        if self.rejected:
            what = "proposals were" if self.rejected > 1 else "proposal was"
            sentence = f"{self.rejected} {what} rejected without training"
            if self.rejected > self.without_student:
                amount = _amount(self.rejected_tokens, self.rejected_flops, self.rejected_seconds)
                sentence += f": up to the first rung {amount} saved"
            if self.without_student == self.rejected:
                sentence += ", the teacher having no such student: nothing is counted as saved"
            elif self.without_student:
                sentence += f"; {self.without_student} of them count nothing, as the teacher has no such student"
            said.append(sentence)
        return tuple(said)


def _amount(tokens: int, flops: float, seconds: float) -> str:
    return f"{tokens:,} tokens (about {flops:.2g} FLOPs, {format_duration(seconds)} of a worker)"


def saved(events: Iterable[RunEvent], plan: Plan) -> Saved:
    """Compute the savings from the log of a run."""
    events = list(events)
    weights = {event.trial: event.parameters or 0 for event in of_kind(events, TrialAdded)}
    rungs, lost = of_kind(events, RungReached), of_kind(events, WorkLost)
    ends = {event.trial: event.status for event in of_kind(events, TrialEnded)}
    rejected = [trial for trial, status in ends.items() if status is Status.REJECTED]
    described = [trial for trial in rejected if weights.get(trial)]
    results: list[RungReached | StudentKept] = [*rungs, *of_kind(events, StudentKept)]

    def flops(tokens: Iterable[tuple[str, int]]) -> float:
        return _FLOPS * float(sum(count * weights.get(trial, 0) for trial, count in tokens))

    timed = flops((event.trial, event.trained) for event in results)
    trained = timed + flops((event.trial, event.resumed) for event in rungs)
    trained += flops((event.trial, event.trained) for event in lost)
    workers = [event.workers if isinstance(event, RungReached) else 1 for event in results]
    seconds = sum(count * event.seconds.get("train", 0.0) for count, event in zip(workers, results, strict=True))
    rate = seconds / timed if timed else 0.0
    shared = flops((event.trial, event.shared) for event in rungs)
    avoided = _FLOPS * float(plan.rungs[0]) * sum(weights[trial] for trial in described)
    return Saved(
        trained_tokens=sum(event.trained for event in (*results, *lost)) + sum(event.resumed for event in rungs),
        trained_flops=trained,
        trained_seconds=seconds,
        sharing=len({event.trial for event in rungs if event.shared}),
        shared_tokens=sum(event.shared for event in rungs),
        shared_flops=shared,
        shared_seconds=shared * rate,
        rejected=len(rejected),
        rejected_tokens=plan.rungs[0] * len(described),
        rejected_flops=avoided,
        rejected_seconds=avoided * rate,
        without_student=len(rejected) - len(described),
    )
