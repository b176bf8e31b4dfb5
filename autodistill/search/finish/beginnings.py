"""Further evaluations at the end of a search: a student's beginning, an interpolation, or the whole validation text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autodistill.data.dataset import load_split
from autodistill.errors import TrialFailedError
from autodistill.estimates.fit import fits, holdable
from autodistill.evaluation.evaluate import Evaluation
from autodistill.inference.outputs import TeacherReference
from autodistill.inference.torch_memory import give_back_memory
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales
from autodistill.runs.results.beginnings import beginning_of, beginning_trial, interpolated_trial, worsened
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.make_row import make_row
from autodistill.runs.results.row import Row, Status
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.export_choice import next_candidate
from autodistill.search.worker.begin import begun, scales_as
from autodistill.strategy.strategy import Strategy

_UNREAD: Mapping[str, Any] = {
    **dict.fromkeys(("accuracy", "accuracy_stderr", "perplexity", "agreement", "retention", "documents")),
    "other": {},
}
"""The fields of a row that was not evaluated, set to unknown."""


def settled_candidate(
    rows: list[Row], rejected: Sequence[Row], finisher: Finisher, container: str | None = None
) -> Row | None:
    """Return the row to export, after all evaluations that the choice depends on.

    A student that would be chosen is compared with its own beginning in the same deployment. If a rung read only part
    of the validation text, the student is first evaluated on all of it. New rows may change the choice.

    Args:
        rows, rejected, container: See `next_candidate`. New evaluations are added to `rows`.
        finisher: What the final steps share.
    """
    while True:
        candidate = next_candidate(rows, rejected, finisher.question, container)
        if candidate is None or not settle(candidate, rows, finisher):
            return candidate


def settle(row: Row, rows: list[Row], finisher: Finisher) -> bool:
    """Make the next evaluation that the choice of a row depends on, and add it to `rows`.

    Returns:
        Whether something was evaluated. False means that the choice is settled.
    """
    if row.kind not in DISTILLED or row.strategy is None:
        return False
    whole = {_read(one) for one in rows if one.kind == "teacher" and one.documents is not None}
    if not row.full and whole and _read(row) not in whole:
        made = read_whole(row, finisher)
    elif beginning_of(row, rows) is None:
        made = _beginning(row, finisher)
    else:
        return False
    finisher.write(made)
    rows[:] = [*(one for one in rows if one.row_id != made.row_id), made]
    if made.kind == "initial" and worsened([row, made], finisher.question.metric, finisher.question.direction):
        # The beginning is better than the trained student and may be exported now or later, so it is stored.
        finisher.student(made)
    return True


def part_way(row: Row, share: float) -> Row:
    """Return the row of a student whose weights are interpolated between its beginning and its end, not yet evaluated.

    Args:
        row: The row of the student at the end of its training.
        share: The position of the weights, above 0 (beginning) and below 1 (end).
    """
    trial = interpolated_trial(row.trial, share)
    return replace(
        row,
        row_id=f"{trial}-{row.deployment_name}",
        trial=trial,
        name=f"{row.name}, {share:.0%} of the way",
        interpolation=share,
        **_UNREAD,
    )


def read_whole(row: Row, finisher: Finisher) -> Row:
    """Evaluate a row on all of the validation split that the plan allows, and return it with the new figures."""
    with finisher.phases.phase("evaluate", f"{row.name} as {row.deployment_name}, read whole"):
        scales = read_scales(finisher.student(row), row.deployment)
        evaluation = _evaluate(finisher.load(row), row, finisher, scales)
    return _row(evaluation, row, finisher)


def plain_rows(rows: Sequence[Row], finisher: Finisher) -> Iterator[Row]:
    """Yield the teacher in plain types with a 16-bit cache, the widest that fits first, each evaluated when asked for.

    Args:
        rows: Rows of the validation split, which are not made again.
        finisher: What the final steps share.
    """
    question, spec = finisher.question, finisher.setting.teacher_spec
    told = (one for one in question.deployments if one.runtime == "llama.cpp" and not one.types)
    plain = dict.fromkeys(replace(one, cache_type_k="f16", cache_type_v="f16") for one in told)
    known = {row.deployment for row in rows if row.kind == "teacher"}
    teacher = next((row for row in rows if row.kind == "teacher"), None)
    for fit in sorted(fits(spec, holdable(spec, tuple(plain)), question.budget), key=lambda fit: -fit.need):
        if teacher is not None and fit.slack <= 0 and fit.deployment not in known:
            made = replace(teacher, deployment=fit.deployment)
            with finisher.phases.phase("evaluate", f"teacher as {made.deployment_name}"):
                scales = read_scales(finisher.student(made), made.deployment)
                yield _row(_evaluate(finisher.load(made), made, finisher, scales), made, finisher)


def _read(row: Row) -> int:
    """Return the number of tokens or questions that a row was evaluated on."""
    return sum(row.documents["count"]) if row.documents is not None else 0


def _beginning(row: Row, finisher: Finisher) -> Row:
    """Evaluate a student's beginning, packed like the student. If that fails, the returned row has no figures."""
    made = replace(
        row,
        row_id=f"{beginning_trial(row.trial)}-{row.deployment_name}",
        trial=beginning_trial(row.trial),
        kind="initial",
        name=f"untrained {row.trial}",
        train_tokens=0,
        train_seconds=0.0,
    )
    with finisher.phases.phase("evaluate", f"{made.name} as {made.deployment_name}"):
        strategy = _strategy(row)
        model, scales = begun(finisher.setting, strategy, row.seed or 0)
        held = scales_as(scales, strategy, finisher.spec(strategy), row.deployment)
        try:
            evaluation = _evaluate(model, row, finisher, held)
        except TrialFailedError as error:
            reason = f"it cannot be measured ({error.cause}): {error}"
            return replace(
                made,
                status=Status.FAILED.value,
                feasible=False,
                reason=reason,
                **_UNREAD,
            )
        finally:
            del model
            give_back_memory()
    return _row(evaluation, made, finisher)


def _evaluate(model: Any, row: Row, finisher: Finisher, scales: Mapping[str, Scales]) -> Evaluation:
    """Evaluate a model, packed in the row's deployment, on all of the validation split that the plan allows."""
    setting, plan = finisher.setting, finisher.question.plan
    init, deployment = row.strategy.init if row.strategy else None, row.deployment
    data = load_split(setting.data, "validation", setting.rendering(init)).head(plan.eval_tokens)
    reference = TeacherReference.load(setting.teacher_reference).head(data.predicted)
    return setting.evaluate(model, finisher.spec(row.strategy), deployment, data, reference, init, scales=scales)


def _strategy(row: Row) -> Strategy:
    assert row.strategy is not None
    return row.strategy


def _row(evaluation: Evaluation, row: Row, finisher: Finisher) -> Row:
    question = finisher.question
    made = make_row(
        evaluation,
        trial=row.trial,
        kind=row.kind,
        name=row.name,
        strategy=row.strategy,
        spec=finisher.spec(row.strategy),
        status=Status(row.status),
        split="validation",
        budget=question.budget,
        plan=question.plan,
        train_tokens=row.train_tokens or 0,
        train_seconds=row.train_seconds or 0.0,
        seed=row.seed or 0,
        device=question.served_on,
    )
    return replace(made, interpolation=row.interpolation)
