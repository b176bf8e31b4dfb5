"""Notes about the exported student, or about why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autodistill.estimates.fit import fits, holdable
from autodistill.hardware.budget import Budget, DeviceBudget, on_gpu
from autodistill.hardware.lookup import is_machine
from autodistill.runs.events import TrialEnded
from autodistill.runs.results.beginnings import worsened
from autodistill.runs.results.gains import named
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED, limits_of, nearest
from autodistill.runs.results.row import FORGOT, Row, Status
from autodistill.runs.results.selection import in_order, untrained_in_order
from autodistill.search.finish.context import Finisher
from autodistill.units import format_bytes, format_duration


def notes_on(best: Row, rows: Sequence[Row], finisher: Finisher) -> tuple[str, ...]:
    """Return notes on whether the budget binds, the tightest budget that the best row meets, and what training gained.

    Args:
        best: The exported row.
        rows: The rows of the validation split at the end of the search.
        finisher: What the final steps share.
    """
    question = finisher.question
    limit = question.budget.memory_bytes
    told = []
    spec = finisher.setting.teacher_spec
    fitting = fits(spec, holdable(spec, question.deployments), question.budget)
    if fitting and max(fit.slack for fit in fitting) <= 0:
        most = max(fitting, key=lambda fit: fit.need)
        told.append(
            f"the budget of {format_bytes(limit)} excludes nothing: the teacher fits under every quantisation scheme; "
            f"{most.deployment.name} needs most, {format_bytes(most.need)}"
        )
    memory = best.memory_bytes or 0
    if not question.space.dimensions:
        # A single strategy was trained without a search, so the budget excluded nothing.
        told = []
    what = named(best) if best.kind in UNTRAINED else "the best student"
    told.append(
        f"the tightest budget that {what} still meets is {format_bytes(memory)} ({memory} bytes, "
        f"{best.memory_source}), at context {question.budget.context} and batch {question.budget.batch}"
    )
    if on_gpu(question.budget) and best.memory_source != "measured":
        told.append("its memory is that of the GPU: predicted, not measured on a GPU")
    told += _on_device(best, question.budget)
    told += _without_training(best, rows, finisher)
    told += _worsened(rows, finisher)
    if best.fidelity is not None and best.fidelity > 1 + 1e-9:
        tokens = f"{best.train_tokens:,} tokens, while a trial has {question.plan.tokens:,}"
        further = f"the best student was trained on {tokens}"
        if any(row.kind == "baseline" for row in rows):
            further += (
                "; the gain over the baseline compares students with equal tokens if both were trained on that many"
            )
        told.append(further)
    if best.kind == "baseline" and best.full and question.space.dimensions:
        told.append("no searched strategy beat the baseline")
    return tuple(told)


def _on_device(best: Row, budget: Budget) -> list[str]:
    """Return notes on the best row and the latency limits: measured or predicted, and any doubts about the figures."""
    notes = []
    if isinstance(budget, DeviceBudget) and budget.latency:
        here = best.latency_source == "measured" and is_machine(budget.device, best.machine or "")
        source = "measured" if here else "predicted"
        told = ", ".join(
            f"{limit.name} {format_duration((best.figure(limit.name) or 0) / 1e3)} of {format_duration(limit.seconds)}"
            for limit in budget.latency
        )
        notes.append(f"on {budget.device.name} the best student has, {source}: {told}")
        if best.other.get("latency_assumed"):
            notes.append(f"these are assumed, at the slow end of a wide band: {best.other['latency_assumed']}")
        if not here:
            notes.append("its limits of latency are met by prediction only: measure it on the device itself")
    if best.figure("latency_ms") is not None and best.other.get("latency_doubts"):
        notes.append(f"the measured latency is doubtful: {best.other['latency_doubts']}")
    return notes


def _without_training(best: Row, rows: Sequence[Row], finisher: Finisher) -> list[str]:
    """Return a note if the exported row was not trained, or is no better than the best untrained row."""
    metric, direction = finisher.question.metric, finisher.question.direction

    def told(row: Row) -> str:
        return f"{metric} {row.figure(metric) or 0.0:.4f} in {format_bytes(row.memory_bytes or 0)}"

    ties = "of rows that are equal within one standard error, the smaller is better"
    if best.kind in UNTRAINED and any(row.reason == FORGOT for row in rows):
        # The notes about forgetting already say it.
        return []
    if best.kind in UNTRAINED:
        students = in_order([row for row in rows if row.kind not in UNTRAINED], metric, direction, students_only=True)
        said = f"{named(best)} is exported, {told(best)}: no trained student is better"
        if not students:
            return [f"{said}, and no trained student fits"]
        return [f"{said}; the best trained student, {named(students[0])}, has {told(students[0])}; {ties}"]
    # A student that did not reach the plan's end is compared by its metric like any other.
    beside = [best if best.full else replace(best, fidelity=1.0), *untrained_in_order(rows, metric, direction)]
    first = in_order(beside, metric, direction, students_only=False)[0]
    if first.kind not in UNTRAINED:
        return []
    whole = first.kind == "teacher" and first.deployment.bits == 16
    beats = "the unchanged teacher is better here" if whole else "quantising the teacher beats distilling it here"
    beats = beats if first.kind == "teacher" else "an untrained student is better here"
    return [f"{beats}: {named(first)} has {told(first)}, the best student {told(best)}; {ties}"]


def _worsened(rows: Sequence[Row], finisher: Finisher) -> list[str]:
    """Return a note about students that training made worse than their own beginning, with both figures of the best."""
    metric, direction = finisher.question.metric, finisher.question.direction
    pairs = [(row, before) for row, before in worsened(rows, metric, direction) if row.full and row.kind in DISTILLED]
    if not pairs:
        return []
    best = in_order([row for row, _ in pairs], metric, direction, students_only=True)
    row, before = next((pair for pair in pairs if best and pair[0] == best[0]), pairs[0])
    others = len({one.trial for one, _ in pairs} - {row.trial})
    more = f", and so did that of {others} other trial{'s' * (others > 1)}" if others else ""
    passed = "" if finisher.question.students_only else ", which is why it was passed over"
    return [
        f"the training of {named(row)} made it worse than before: {metric} {row.figure(metric):.4f} after it, "
        f"{before.figure(metric):.4f} before ({named(before)}){passed}{more}"
    ]


def nothing_fits(rows: Sequence[Row], judged: bool, finisher: Finisher) -> str:
    """Return why nothing could be exported, and what to do.

    Args:
        rows: The rows that came nearest to the budget.
        judged: Whether any student was judged.
        finisher: What the final steps share.
    """
    limits = limits_of(finisher.question.budget)
    needs = {f"{row.name} as {row.deployment_name}": {name: row.figure(name) for name in limits} for row in rows}
    closest = nearest(needs, limits)
    if closest is None and judged:
        return "there is no evaluated student to export: go on with --resume and more --time"
    failed = [event for event in finisher.run.events.of(TrialEnded) if event.status is Status.FAILED]
    if closest is None and failed:
        return (
            f"no student was trained, since {len(failed)} training{'s' if len(failed) > 1 else ''} failed, the first "
            f"by {failed[0].reason}: change the strategy, its distillation.learning_rate say, and start a new run"
        )
    if closest is None:
        return "no training reached a rung: go on with --resume and more --time, or start with fewer --tokens"
    return f"nothing fits the budget: the nearest candidate, {closest.candidate}, {closest.describe()}; raise --budget"
