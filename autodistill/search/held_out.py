"""The test split: opened once at the end of a search, for the student that was found and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from autodistill.applied import initial_student, student_spec
from autodistill.contracts import Direction, Status
from autodistill.distillation.grid_scales import read_scales
from autodistill.distillation.held import load_held
from autodistill.distillation.scoring import refer
from autodistill.evaluation import Evaluation, evaluate
from autodistill.records.differences import paired, paired_difference
from autodistill.records.leaderboard import rank
from autodistill.records.openings import already_opened, record_test_opening, times_opened
from autodistill.records.row import Row, rows_of
from autodistill.search.exportable import trained_rows
from autodistill.search.finisher import Finisher
from autodistill.search.rows import make_row
from autodistill.strategy import IN_16_BITS, Deployment, Strategy
from autodistill.token_sets import load_split


def known_on_test(best: Row, compared: Sequence[tuple[Row, Deployment]], finisher: Finisher) -> tuple[Row, ...] | None:
    """The rows of an earlier opening of the test split, in its order, where they are of all that would be scored.

    The plan, and with it what is read of the split, never changes within a run.
    """
    deployment = Deployment.from_json(best.deployment)
    of_teacher = [("teacher", "teacher", packing.name, None, 0) for packing in dict.fromkeys((IN_16_BITS, deployment))]
    of_initial = ("initial", "initial", deployment.name, best.strategy, 0)
    of_students = [
        (row.kind, row.trial, packing.name, row.strategy, row.train_tokens or 0)
        for row, packing in ((best, deployment), *compared)
    ]
    logged = {(row.kind, row.trial, row.deployment_name): row for row in rows_of(finisher.run.events.read(), ("test",))}
    found = []
    for kind, trial, packing, strategy, tokens in (*of_teacher, of_initial, *of_students):
        row = logged.get((kind, trial, packing))
        if row is None or (row.strategy, row.train_tokens or 0) != (strategy, tokens):
            return None
        found.append(row)
    return tuple(found)


def score_on_test(best: Row, rows: Sequence[Row], finisher: Finisher) -> tuple[Row, ...]:
    """Opens the test split, once, for the student, the baseline, the undistilled student and the teacher.

    A search that ends once more with what it had takes their rows from its log, and opens nothing.
    """
    question, setting = finisher.question, finisher.setting
    compared = compared_with(best, rows, finisher)
    known = known_on_test(best, compared, finisher)
    if known is not None:
        finisher.line("the test split is not opened again: what is exported has been scored on it")
        return known
    record_test_opening(finisher.run.path.parent, run=finisher.run.name, data=finisher.data.fingerprint)
    data = load_split(finisher.data.folder, "test").head(question.plan.test_tokens)
    deployment = Deployment.from_json(best.deployment)
    teacher = load_held(finisher.teacher.folder, setting.held, setting.device)
    _, reference = refer(teacher, data, device=setting.device)
    results: list[Row] = []

    def score(model: Any, row: Row | None, packing: Deployment, strategy: Strategy | None) -> Evaluation:
        """What one model is on test, under one deployment."""
        init = strategy.init if strategy else None
        return evaluate(
            model,
            student_spec(strategy, setting.teacher_spec) if strategy else setting.teacher_spec,
            packing,
            load_split(finisher.data.folder, "test", setting.rendering(init)).head(question.plan.test_tokens),
            reference,
            budget=question.budget,
            evaluators=setting.evaluators,
            metric=setting.metric,
            device=setting.device,
            scales=read_scales(finisher.student(row), packing) if row else None,
            split="test",
            share=setting.plan.example_share,
            tokenizer=setting.text(init),
        )[0]

    def write(evaluation: Evaluation, row: Row | None, kind: str, name: str, strategy: Strategy | None) -> None:
        """Makes a row of it, and writes that down."""
        made = make_row(
            evaluation,
            trial=row.trial if row else kind,
            kind=kind,
            name=name,
            strategy=strategy,
            spec=student_spec(strategy, setting.teacher_spec) if strategy else setting.teacher_spec,
            status=Status.COMPLETED,
            split="test",
            budget=question.budget,
            plan=question.plan,
            train_tokens=row.train_tokens or 0 if row else 0,
            train_seconds=row.train_seconds or 0.0 if row else 0.0,
            seed=question.plan.seed,
        )
        finisher.write("test", made)
        results.append(made)

    for packing in dict.fromkeys((IN_16_BITS, deployment)):
        evaluation = score(teacher, None, packing, None)
        write(evaluation, None, "teacher", "teacher", None)
    del teacher
    strategy = Strategy.from_json(best.strategy)
    if strategy.init.source != "teacher" or student_spec(strategy, setting.teacher_spec) != setting.teacher_spec:
        initial, _ = initial_student(setting, strategy.init, question.plan.seed)
        evaluation = score(initial.to(setting.device), None, deployment, strategy)
        del initial
    # Else it begins as the teacher, which was scored under that deployment last.
    write(evaluation, None, "initial", "undistilled student", strategy)
    for row, packing in ((best, deployment), *compared):
        strategy = Strategy.from_json(row.strategy)
        write(score(finisher.load(row), row, packing, strategy), row, row.kind, row.name, strategy)
    return tuple(results)


def spent(finisher: Finisher) -> tuple[str, ...]:
    """Says so where this run was scored on test before."""
    earlier = times_opened(finisher.run, finisher.data.fingerprint) - 1
    if earlier < 1:
        return ()
    return (f"{already_opened(earlier)}, and its figures no longer say how well a choice does on unseen documents",)


def compared_with(best: Row, rows: Sequence[Row], finisher: Finisher) -> list[tuple[Row, Deployment]]:
    """What the best student is held to: the best baseline of as many tokens, under the deployment that suits it best.

    Where there is none, as the best was trained on, the best of those that had as many as it had before: and the best
    student as it was then, packed as it is now.
    """
    question = finisher.question
    trained = trained_rows(rows, question.metric, finisher.has)
    if best.kind == "baseline":
        return []

    def first(tokens: int | None = None) -> list[tuple[Row, Deployment]]:
        """The best baseline, of so many tokens."""
        found = [row for row in trained if row.kind == "baseline" and tokens in (None, row.train_tokens)]
        ranked = (one.row for one in rank(found, question.metric, question.direction))
        return [(row, Deployment.from_json(row.deployment)) for row in islice(filter(finisher.whole, ranked), 1)]

    if baseline := first(best.train_tokens):
        return baseline
    same = [row for row in trained if row.kind == best.kind and (row.strategy, row.seed) == (best.strategy, best.seed)]
    for row in sorted(same, key=lambda row: row.train_tokens or 0, reverse=True):
        if row.train_tokens != best.train_tokens and finisher.whole(row) and (baseline := first(row.train_tokens)):
            return [*baseline, (row, Deployment.from_json(best.deployment))]
    return first()


def gain_on_test(test: Sequence[Row], metric: str, direction: Direction) -> tuple[float, float | None] | None:
    """By how much the found student is better than the baseline, paired by document, and its standard error.

    Where the best was trained on further than the baseline, it is the one of as many tokens that is compared. None
    without a baseline, and of a metric of which nothing can be paired.
    """
    students, baselines = ([row for row in test if row.kind == kind] for kind in ("student", "baseline"))
    pairs = [(one, other) for one in students for other in baselines if one.train_tokens == other.train_tokens]
    pairs = pairs or [(one, other) for one in students for other in baselines]
    if not pairs:
        return None
    found, baseline = (paired(row, metric) for row in pairs[0])
    made = paired_difference(found, baseline)
    return made if made is None or direction == "max" else (-made[0], made[1])
