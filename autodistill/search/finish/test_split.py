"""The test split: read once at the end of a search, for the exported row and the rows it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from autodistill.data.dataset import load_split
from autodistill.estimates.divided import splits
from autodistill.evaluation.base import Direction
from autodistill.evaluation.evaluate import Evaluation
from autodistill.evaluation.precision import scored_in
from autodistill.inference.outputs import TeacherReference, TokenScores
from autodistill.inference.scoring import score_teacher
from autodistill.inference.tensor_parallel import load_teacher
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales
from autodistill.runs.events import RowTested
from autodistill.runs.results.gains import Gain, Gains, named, unit_of
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED, rank
from autodistill.runs.results.make_row import make_row
from autodistill.runs.results.row import Row, Status
from autodistill.runs.results.selection import untrained_in_order
from autodistill.runs.test_split_ledger import already_opened, record_test_opening, times_opened
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.export_choice import trained_rows
from autodistill.search.worker.begin import begun, scales_as
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.strategy.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """One model under one deployment, to be scored on the test split.

    Attributes:
        kind, trial, name: The same fields as in its row.
        packing: The deployment.
        row: The row of the validation split: of the model itself, or of the student whose beginning this is. None for
            the teacher.
    """

    kind: str
    trial: str
    name: str
    packing: Deployment
    row: Row | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that it was trained on, 0 for an untrained model."""
        return self.row.train_tokens or 0 if self.row is not None and self.kind in DISTILLED else 0

    @property
    def strategy(self) -> Strategy | None:
        """The strategy of its row, or None for the teacher."""
        return self.row.strategy if self.row is not None else None


def best_untrained(rows: Sequence[Row], finisher: Finisher) -> Row | None:
    """Return the validation row that would be exported without any training, or None if no untrained row fits."""
    question = finisher.question
    return next(iter(untrained_in_order(rows, question.metric, question.direction)), None)


def _to_score(
    best: Row, untrained: Row | None, compared: Sequence[tuple[Row, Deployment]], setting: TrialSetting
) -> list[_Scored]:
    """Return what is scored on the test split, in the order of its rows, each once.

    A divided teacher is left out under a deployment whose groups the division cuts through.
    """
    deployment = best.deployment
    packings = [IN_16_BITS, deployment]
    if untrained is not None and untrained.kind == "teacher":
        packings.append(untrained.deployment)
    # A 16-bit folder has the same name for all runtimes, so this removes duplicates.
    named = {one.name: one for one in packings if not splits(setting.teacher_spec, one, setting.divided)}.values()
    found = [_Scored(kind="teacher", trial="teacher", name="teacher", packing=one) for one in named]
    if best.kind in DISTILLED:
        begun = _Scored(kind="initial", trial="initial", name="untrained student", packing=deployment, row=best)
        found.append(begun)
    others = [best]
    if untrained is not None and untrained.row_id != best.row_id and not _is_among(untrained, found):
        others.append(untrained)
    students = [*((one, one.deployment) for one in others if one.kind != "teacher"), *compared]
    for row, packing in students:
        found.append(_Scored(kind=row.kind, trial=row.trial, name=row.name, packing=packing, row=row))
    return found


def _is_among(untrained: Row, scored: Sequence[_Scored]) -> bool:
    """Return whether an untrained student begins like one that is already scored in the same deployment."""
    return any(
        one.kind == untrained.kind == "initial"
        and one.packing.name == untrained.deployment_name
        and _begins_alike(one.strategy, untrained.strategy)
        for one in scored
    )


def _begins_alike(one: Strategy | None, other: Strategy | None) -> bool:
    return one is not None and other is not None and one.begins_as(other)


def on_test(row: Row, test: Sequence[Row]) -> Row | None:
    """Return the test row of the same model in the same deployment, or None."""
    for one in test:
        packed = one.deployment_name == row.deployment_name and one.kind == row.kind
        if packed and (one.trial == row.trial or (row.kind == "initial" and _begins_alike(one.strategy, row.strategy))):
            return one
    return None


def known_on_test(
    best: Row, untrained: Row | None, compared: Sequence[tuple[Row, Deployment]], finisher: Finisher
) -> tuple[Row, ...] | None:
    """Return the rows of an earlier access to the test split if they cover all that would be scored now, else None.

    The plan never changes within a run, so each access reads the same part of the split.
    """
    logged = {(row.kind, row.trial, row.deployment_name): row for row in finisher.run.events.rows(RowTested)}
    found = []
    for one in _to_score(best, untrained, compared, finisher.setting):
        row = logged.get((one.kind, one.trial, one.packing.name))
        if row is None or (row.strategy, row.train_tokens or 0) != (one.strategy, one.tokens):
            return None
        found.append(row)
    return tuple(found)


def score_on_test(best: Row, untrained: Row | None, rows: Sequence[Row], finisher: Finisher) -> tuple[Row, ...]:
    """Read the test split once, for the exported row, the best untrained row, the baseline and the teacher.

    If a search ends again with the same rows, their test rows are taken from its log, and the split is not read.

    Args:
        best: The exported row.
        untrained: See `best_untrained`.
        rows: The rows of the validation split.
        finisher: What the final steps share.
    """
    question, setting = finisher.question, finisher.setting
    compared = compared_with(best, rows, finisher)
    known = known_on_test(best, untrained, compared, finisher)
    if known is not None:
        finisher.line("the test split is not used again: what is exported has been scored on it")
        return known
    record_test_opening(finisher.run.path.parent, run=finisher.run.name, data=finisher.data.fingerprint)
    data = load_split(finisher.data.folder, "test").head(question.plan.test_tokens)
    teacher = load_teacher(finisher.teacher.folder, setting.held_type, setting.device, setting.divided)
    with scored_in(teacher, setting.scoring, setting.device):
        own, reference = score_teacher(teacher, data, device=setting.device)
    results: list[Row] = []

    def evaluated(model: Any, one: _Scored, begun_with: Mapping[str, Scales] | None = None) -> Evaluation:
        known = own if one.kind == "teacher" else None
        return _evaluated(model, one, finisher, reference, begun_with=begun_with, unpacked=known)

    def write(evaluation: Evaluation, one: _Scored) -> None:
        made = _row(evaluation, one, finisher)
        finisher.write(made)
        results.append(made)

    scored = _to_score(best, untrained, compared, setting)
    of_teacher = {one.packing: evaluated(teacher, one) for one in scored if one.kind == "teacher"}
    del teacher
    for one in scored:
        if one.kind == "teacher" or (one.packing in of_teacher and _begins_as_teacher(one, finisher)):
            write(of_teacher[one.packing], one)
        elif one.kind == "initial" and one.strategy is not None:
            model, scales = begun(setting, one.strategy, question.plan.seed)
            held = scales_as(scales, one.strategy, finisher.spec(one.strategy), one.packing)
            write(evaluated(model, one, held), one)
        elif one.row is not None:
            write(evaluated(finisher.load(one.row), one), one)
    return tuple(results)


def _evaluated(
    model: Any,
    one: _Scored,
    finisher: Finisher,
    reference: TeacherReference,
    *,
    begun_with: Mapping[str, Scales] | None,
    unpacked: TokenScores | None,
) -> Evaluation:
    """Evaluate one model on the test split under its deployment.

    Args:
        model: The model, in float32 or, for the teacher, in the type that it is held in.
        one: What is scored.
        finisher: What the final steps share.
        reference: The teacher's outputs on the split.
        begun_with: The initial scales of an untrained student.
        unpacked: The model's scores without quantisation, if they are known.
    """
    setting, plan = finisher.setting, finisher.question.plan
    init = one.strategy.init if one.strategy else None
    trained = one.row if one.kind in DISTILLED else None
    # Scales may be stored in the folder of a trained student or of the teacher. An untrained student has no folder.
    folder = finisher.student(trained) if trained else setting.teacher if one.kind == "teacher" else None
    return setting.evaluate(
        model,
        finisher.spec(one.strategy),
        one.packing,
        load_split(finisher.data.folder, "test", setting.rendering(init)).head(plan.test_tokens),
        reference,
        init,
        scales=read_scales(folder, one.packing) if folder else begun_with,
        split="test",
        unpacked=unpacked,
    )


def _row(evaluation: Evaluation, one: _Scored, finisher: Finisher) -> Row:
    """Return the test row for an evaluation."""
    question = finisher.question
    trained = one.row if one.kind in DISTILLED else None
    made = make_row(
        evaluation,
        trial=one.trial,
        kind=one.kind,
        name=one.name,
        strategy=one.strategy,
        spec=finisher.spec(one.strategy),
        status=Status.COMPLETED,
        split="test",
        budget=question.budget,
        plan=question.plan,
        train_tokens=one.tokens,
        train_seconds=trained.train_seconds or 0.0 if trained is not None else 0.0,
        seed=question.plan.seed,
    )
    return replace(made, interpolation=None if trained is None else trained.interpolation)


def _begins_as_teacher(one: _Scored, finisher: Finisher) -> bool:
    """Return whether this is an untrained student that equals the teacher."""
    if one.kind != "initial" or one.strategy is None or one.strategy.codes:
        return False
    begins = one.strategy.init.source == "teacher"
    return begins and finisher.spec(one.strategy) == finisher.setting.teacher_spec


def spent(finisher: Finisher) -> tuple[str, ...]:
    """Return a note if this run read the test split before."""
    earlier = times_opened(finisher.run, finisher.data.fingerprint) - 1
    if earlier < 1:
        return ()
    return (f"{already_opened(earlier)}, and its figures no longer say how well a choice does on unseen documents",)


def compared_with(best: Row, rows: Sequence[Row], finisher: Finisher) -> list[tuple[Row, Deployment]]:
    """Return what the best student is compared with: the best baseline of equal tokens, in its own best deployment.

    Extended training may leave no such baseline. Then the best student's earlier rows are tried, the longest training
    first. The result is the best baseline of equal tokens and that earlier student, packed as the best one is now. If
    no earlier row matches a baseline either, the result is the best baseline of any number of tokens.
    """
    question = finisher.question
    trained = trained_rows(rows, question.metric, finisher.has)
    if best.kind == "baseline":
        return []

    def first(tokens: int | None = None) -> list[tuple[Row, Deployment]]:
        """Return the best baseline trained on this many tokens, or on any number if None."""
        found = [row for row in trained if row.kind == "baseline" and tokens in (None, row.train_tokens)]
        ranked = (one.row for one in rank(found, question.metric, question.direction))
        return [(row, row.deployment) for row in islice(filter(finisher.whole, ranked), 1)]

    if baseline := first(best.train_tokens):
        return baseline
    same = [row for row in trained if row.kind == best.kind and (row.strategy, row.seed) == (best.strategy, best.seed)]
    for row in sorted(same, key=lambda row: row.train_tokens or 0, reverse=True):
        if row.train_tokens != best.train_tokens and finisher.whole(row) and (baseline := first(row.train_tokens)):
            return [*baseline, (row, best.deployment)]
    return first()


def gains_on_test(best: Row, untrained: Row | None, test: Sequence[Row], metric: str, direction: Direction) -> Gains:
    """Compute the gains of the exported row on the test split, over the best untrained row and over the baseline.

    If the best student was trained further than the baseline, its earlier state of equal tokens is compared with the
    baseline.

    Args:
        best: The exported row, of the validation split.
        untrained: See `best_untrained`.
        test: Rows of the test split, including those of both models.
        metric, direction: The metric that ranks rows, and its direction.
    """
    found = on_test(best, test)
    rival = on_test(untrained, test) if untrained is not None and best.kind in DISTILLED else None
    return Gains(
        exported=best.row_id,
        named=named(best),
        trained=best.kind not in UNTRAINED,
        untrained=Gain.of(found, rival, metric, direction) if found is not None and rival is not None else None,
        baseline=_over_baseline(best, test, metric, direction),
        unit=unit_of(found or best, metric),
    )


def _over_baseline(best: Row, test: Sequence[Row], metric: str, direction: Direction) -> Gain | None:
    """Return the gain over the baseline of equal tokens, or over any baseline if none has equal tokens, or None."""
    found = on_test(best, test)
    baselines = [row for row in test if row.kind == "baseline"] if best.kind != "baseline" else []
    students = [row for row in test if row.kind == "student"] if best.kind == "student" else [found]
    pairs = [(one, other) for one in students for other in baselines if one is not None]
    equal = [pair for pair in pairs if pair[0].train_tokens == pair[1].train_tokens]
    return next((Gain.of(one, other, metric, direction) for one, other in equal or pairs), None)
