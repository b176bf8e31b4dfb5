"""Detects what training made a student forget: compares its loss on general text with the best untrained row's.

A student that learned one text is further from its teacher on every other text, even if it predicts that text better.
Example: 135M weights, the scales of 4 bits trained on one manual. The KL to the teacher on two other texts rose from 0
to .22 and .35 nats a token, while the loss on them fell by .06. So the loss decides, and the KL is only reported. From
the best student that forgot, another student is made that is closer to its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autodistill.data.dataset import TokenSet
from autodistill.data.general_text import general_sequences
from autodistill.errors import TrialFailedError
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.evaluation.precision import scored_in
from autodistill.evaluation.statistics import clustered_mean
from autodistill.inference.outputs import TeacherReference, TokenScores
from autodistill.inference.scoring import score, score_teacher
from autodistill.inference.tensor_parallel import load_teacher
from autodistill.inference.torch_memory import give_back_memory
from autodistill.quantization.learned_scales import read_scales
from autodistill.runs.results.gains import named
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.row import FORGOT, Row
from autodistill.runs.results.selection import untrained_in_order
from autodistill.search.finish.beginnings import part_way, read_whole
from autodistill.search.finish.context import Finisher

_ERRORS = 2.0
"""A student forgot if its difference, paired by document, exceeds this many standard errors."""

_MOST_TOKENS = 8192
_FEWEST_DOCUMENTS = 4
_TRIED = 3  # students that are read: if the best ones forgot, the next ones most likely did too
_FIRST_SHARE, _STEPS = 0.5, (0.25, 0.125, 0.0)
"""The first share of the way to a student that forgot, and the steps down or up to the next shares."""


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """Comparison of a student with the best untrained row on general text.

    Attributes:
        row, untrained: Ids of both rows.
        loss, untrained_loss: Mean cross-entropy of each, in nats a token.
        difference, stderr: The student's loss minus the other's, paired by document, and its standard error.
        kl, untrained_kl: Mean KL of the teacher to each, in nats a token.
        text: Name of the text.
        tokens, documents: How much of the text was read.
    """

    row: str
    untrained: str
    loss: float
    untrained_loss: float
    difference: float
    stderr: float
    kl: float
    untrained_kl: float
    text: str
    tokens: int
    documents: int

    @property
    def worse(self) -> bool:
        """Whether the student's loss is higher by more than the standard errors explain."""
        return self.difference > _ERRORS * self.stderr

    def describe(self, student: str) -> str:
        """Return the comparison as a sentence."""
        found = f"{self.difference:+.4f} ± {self.stderr:.4f}"
        return (
            f"on general text ({self.text}, {self.tokens:,} tokens of {self.documents} documents) {student} loses "
            f"{self.loss:.4f} nats a token ({self.kl:.4f} from the teacher), the best row that needs no training "
            f"{self.untrained_loss:.4f} ({self.untrained_kl:.4f}): "
            + (f"training made it forget ({found})" if self.worse else f"nothing was forgotten ({found})")
        )


@dataclass(frozen=True, kw_only=True)
class _Text:
    data: TokenSet
    teacher: TokenScores
    reference: TeacherReference


class Gate:
    """Checks export candidates on general text. The text is read only when a trained student is checked.

    Args:
        finisher: What the final steps share.

    Attributes:
        refused: Students that forgot, in the order in which they were checked.
        unknown: Why it is unknown what was forgotten, or None if it is known.
    """

    def __init__(self, finisher: Finisher) -> None:
        self.refused: list[tuple[Row, Forgotten]] = []
        self.unknown: str | None = None
        self._finisher = finisher
        self._text: _Text | None = None
        self._read: dict[str, TokenScores] = {}

    @property
    def holds(self) -> bool:
        """Whether a student that forgot is passed over. Not with `--goal task` or `--students-only`."""
        question = self._finisher.question
        return question.goal == "general" and not question.students_only

    def refused_with(self, row: Row, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that must not be exported if this student forgot, with the reason. Empty if it did not.

        Once the best few students forgot, all other students are passed over too, without being read.

        Args:
            row: The row that would be chosen.
            rows: All rows to choose among, including untrained ones.
        """
        if not self.holds or row.kind not in DISTILLED:
            return []
        found = self.forgotten(row, rows)
        if found is None or not found.worse:
            return []
        self.refused.append((row, found))
        self._finisher.line(f"{row.name} is passed over: {found.describe('it')}")
        passed = [row]
        if len(self.refused) >= _TRIED:
            others = [one for one in rows if one.kind in DISTILLED and one.feasible and one.row_id != row.row_id]
            passed += [one for one in others if one.interpolation is None]
        return [replace(one, feasible=False, reason=FORGOT) for one in passed]

    def instead_of(self, row: Row, rows: Sequence[Row]) -> Row | None:
        """Return an interpolated student, as far as possible from its beginning without having forgotten, or None.

        One standard error is allowed here, and two for a fully trained student. The limit is stricter because several
        students are tried on one short text, and the luckiest would be taken. None if all tried ones forgot. Only the
        first student that forgot is interpolated, so for every other row the result is None.

        Args:
            row: The row that was passed over.
            rows: See `refused_with`.
        """
        if [one.row_id for one, _ in self.refused] != [row.row_id] or row.interpolation is not None:
            return None
        kept: Row | None = None
        share = _FIRST_SHARE
        for step in _STEPS:
            made = part_way(row, share)
            found = self.forgotten(made, rows)
            if found is None:
                return None
            forgot = found.difference > found.stderr
            self._finisher.line(
                f"{made.name} loses {found.difference:+.4f} ± {found.stderr:.4f} nats of general text more than "
                f"the best row that needs no training: {'too far' if forgot else 'it may be exported'}"
            )
            kept = kept if forgot else made
            share += -step if forgot else step
        return None if kept is None else read_whole(kept, self._finisher)

    def forgotten(self, row: Row, rows: Sequence[Row]) -> Forgotten | None:
        """Return what a student forgot, or None if that is unknown. `unknown` then has the reason.

        Args:
            row: The row of a trained student.
            rows: See `refused_with`.
        """
        question, general = self._finisher.question, self._finisher.general
        untrained = next(iter(untrained_in_order(rows, question.metric, question.direction)), None)
        if untrained is None:
            self.unknown = "no row that needs no training fits, so there is nothing to compare it with"
        text = self._texts() if self.unknown is None else None
        if text is None or untrained is None:
            return None
        own, other = self._scores(row, text), self._scores(untrained, text)
        if own is None or other is None:
            return None
        assert own.divergence is not None
        assert other.divergence is not None
        difference, stderr = clustered_mean(own.nll - other.nll, text.teacher.documents)
        return Forgotten(
            row=row.row_id,
            untrained=untrained.row_id,
            loss=float(own.nll.mean()),
            untrained_loss=float(other.nll.mean()),
            difference=difference,
            stderr=stderr or 0.0,
            kl=float(own.divergence.mean()),
            untrained_kl=float(other.divergence.mean()),
            text=general.name,
            tokens=own.nll.size,
            documents=np.unique(text.teacher.documents).size,
        )

    def notes(self, best: Row, rows: Sequence[Row]) -> tuple[Forgotten | None, list[str]]:
        """Return what the exported student forgot, and sentences about that and about the students passed over.

        Args:
            best: The exported row.
            rows: See `refused_with`.
        """
        if best.kind not in DISTILLED:
            if not self.refused:
                return None, []
            row, found = self.refused[0]
            run = self._finisher.run.name
            return found, [
                f"{named(row)} is better by the metric and was passed over: {found.describe('it')}; with --goal task "
                f"the metric alone counts, and `autodistill export {run} --row {row.row_id}` exports it"
            ]
        own = self.forgotten(best, rows)
        if best.interpolation is not None and own is not None and self.refused:
            _, whole = self.refused[0]
            part = f"its weights lie {best.interpolation:.0%} of the way from where its training began to its end"
            return own, [f"{own.describe('the best student')}; {part}, since {whole.describe('the end')}"]
        if own is None:
            return None, [f"what the best student forgot of general text is not known: {self.unknown}"]
        asked = "--students-only" if self._finisher.question.students_only else "--goal task"
        allowed = "" if self.holds or not own.worse else f", which {asked} allows"
        return own, [own.describe("the best student") + allowed]

    def _texts(self) -> _Text | None:
        """Return the sequences and the teacher's outputs for them, computed once. None if the text is unusable."""
        if self._text is not None:
            return self._text
        finisher = self._finisher
        setting, plan = finisher.setting, finisher.question.plan
        if finisher.general.fingerprint == finisher.trained_text:
            self.unknown = "--general-text is the text that is trained on"
            return None
        tokens = min(plan.eval_tokens, _MOST_TOKENS)
        data = general_sequences(finisher.general, setting.teacher, plan.sequence_length, tokens)
        count = 0 if data is None else np.unique(data.documents).size
        if data is None or count < _FEWEST_DOCUMENTS:
            self.unknown = f"of {finisher.general.name} {count} documents hold a sequence, and {_FEWEST_DOCUMENTS} must"
            return None
        with finisher.phases.phase("evaluate", "teacher on general text"):
            teacher = load_teacher(setting.teacher, setting.held_type, setting.device, setting.divided)
            with scored_in(teacher, setting.scoring, setting.device):
                scores, reference = score_teacher(teacher, data, device=setting.device)
            del teacher
            give_back_memory()
        if not scores.nll.mean() < _entropy(data):
            self.unknown = "the teacher itself knows none: it predicts it no better than word counts do"
            return None
        self._text = _Text(data=data, teacher=scores, reference=reference)
        return self._text

    def _scores(self, row: Row, text: _Text) -> TokenScores | None:
        """Return the scores of a row's packed model for each predicted token, computed once. None if scoring fails."""
        if row.row_id not in self._read:
            with self._finisher.phases.phase("evaluate", f"general text, {row.name} as {row.deployment_name}"):
                found = self._score(row, text)
            if found is None:
                return None
            self._read[row.row_id] = found
        return self._read[row.row_id]

    def _score(self, row: Row, text: _Text) -> TokenScores | None:
        finisher = self._finisher
        model: Any = finisher.load(row)
        scales = read_scales(finisher.student(row), row.deployment)
        try:
            with deployed_weights(model, finisher.spec(row.strategy), row.deployment, scales) as same:
                if same and row.kind == "teacher":
                    return text.teacher
                with scored_in(model, finisher.setting.scoring, finisher.setting.device):
                    return score(model, text.data, text.reference, device=finisher.setting.device)[0]
        except TrialFailedError as error:
            self.unknown = f"{row.name} cannot be read: {error}"
            return None
        finally:
            del model
            give_back_memory()


def _entropy(data: TokenSet) -> float:
    """Return the entropy of the text's own token frequencies (unigrams), in nats a token."""
    counts = np.unique(data.tokens[:, 1:], return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
