"""A search on the math task, prepared as `autodistill search` prepares it, and what its work costs in operations."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from math_teacher import LENGTH, TASK, MathTeacher, math_teacher

from autodistill.applied import student_spec
from autodistill.contracts import ModelSpec, Plan
from autodistill.distillation.schedule import branch_point
from autodistill.records.row import Row, rows_of
from autodistill.records.store import RunFolder, default_cache
from autodistill.search.checked import check_request
from autodistill.search.loading import Place
from autodistill.search.prepare import plan_run, prepare_trials
from autodistill.search.progress import Clock, Observer
from autodistill.search.request import SearchRequest
from autodistill.search.trials import Question
from autodistill.space import Space, load_space
from autodistill.strategy import Strategy
from autodistill.trial_data import TrialSetting
from autodistill.units import Budget

SPACE_FILE = Path(__file__).with_name("math_space.yaml")
# What three of the teacher's layers need at 4 bits: larger students do not fit, narrow ones do with more bits.
BUDGET = Budget(memory_bytes=1_007_250_000, context=64, batch=1)
STEP = 16 * LENGTH
TOKENS = 100 * STEP
RUNG_QUESTIONS, QUESTIONS, TEST_QUESTIONS = 200, 400, 500
METRIC = "accuracy"
RECIPE = "hand_designed"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that stands before the first trial of a search on the math task."""

    question: Question
    setting: TrialSetting
    run: RunFolder
    seconds: float

    @property
    def space(self) -> Space:
        """The space that is searched."""
        return self.question.space

    @property
    def costs(self) -> Costs:
        """What the work of its trials costs."""
        return Costs(self.setting.teacher_spec, self.question.plan)


def require_teacher() -> MathTeacher:
    """The trained math teacher.

    Raises:
        SystemExit: It is not trained yet.
    """
    teacher = math_teacher(0)
    if teacher is None:
        sys.exit("the math teacher is not trained yet: run benchmarks/math_teacher.py first")
    return teacher


@contextmanager
def prepare(out: Path, name: str, *, seed: int = 0, trials: int = 1, tokens: int = TOKENS) -> Iterator[Prepared]:
    """Loads, plans, caches and scores as a search does, on one thread; a run that is there is gone on with.

    Args:
        out: Folder of the runs.
        name: Of the run; its folder is locked within the block.
        seed: Of proposals, data order and projections.
        trials: Of the plan.
        tokens: Training tokens at full fidelity.
    """
    began = time.perf_counter()
    resume = (out / name / "search.json").exists()
    request = SearchRequest(
        budget=BUDGET,
        teacher=str(require_teacher().folder),
        data=TASK,
        space=str(SPACE_FILE),
        metric=METRIC,
        trials=trials,
        tokens=tokens,
        step_tokens=STEP,
        sequence_length=LENGTH,
        seed=seed,
        name=name,
        out=out,
        resume=resume,
        runner="inline",
        cache=default_cache(),
    )
    checked = check_request(request)
    with RunFolder.open(out, name, lock=True) if resume else RunFolder.create(out, name) as run:
        clock = Clock(time.monotonic(), lambda text: None)
        planned = plan_run(checked, Place.alone(), run, clock, Observer())
        # Enough questions that trials can be told apart, the same for all that is compared; one thread everywhere.
        plan = replace(
            planned.plan,
            threads=1,
            workers=1,
            rung_eval_tokens=RUNG_QUESTIONS * LENGTH,
            eval_tokens=QUESTIONS * LENGTH,
            test_tokens=TEST_QUESTIONS * LENGTH,
        )
        ready = prepare_trials(checked, replace(planned, plan=plan), run, clock)
        yield Prepared(question=ready.question, setting=ready.setting, run=run, seconds=time.perf_counter() - began)


def space() -> Space:
    """The space of the math task."""
    return load_space(str(SPACE_FILE))


class Costs:
    """Operations of the work of trials: 6 for each weight and token trained, 2 for each read.

    An evaluation reads its tokens once.

    Args:
        teacher: Its shape.
        plan: Rungs, batch and what evaluations read.
    """

    def __init__(self, teacher: ModelSpec, plan: Plan) -> None:
        self._teacher = teacher
        self._plan = plan

    def weights(self, strategy: Strategy) -> int:
        """Of the student, and of the projections of its states that are trained beside it."""
        spec = student_spec(strategy, self._teacher)
        alignment = strategy.distillation.alignment
        projected = (
            alignment.count * spec.width * self._teacher.width if alignment and alignment.projection != "none" else 0
        )
        return spec.parameters + projected

    def branch(self, rung: int) -> int:
        """Tokens at which the decay towards a rung leaves the stable part, 0 for -1, the start."""
        plan = self._plan
        return branch_point(plan.rungs[rung], plan.decay, plan.batch_tokens) if rung >= 0 else 0

    def stretch_tokens(self, rung: int, reached: int) -> int:
        """Tokens that are trained from one rung, -1 before any, to a higher one, with one decay at its end."""
        return self._plan.rungs[rung] - self.branch(reached)

    def train(self, strategy: Strategy, tokens: int) -> int:
        """Of so many tokens of training."""
        return 6 * self.weights(strategy) * tokens

    def evaluation(self, strategy: Strategy, tokens: int) -> int:
        """Of one evaluation."""
        return 2 * student_spec(strategy, self._teacher).parameters * tokens

    def read_at(self, rung: int) -> int:
        """Tokens that an evaluation reads there."""
        plan = self._plan
        return plan.eval_tokens if rung == len(plan.rungs) - 1 else plan.rung_eval_tokens

    def stretch(self, strategy: Strategy, rung: int, reached: int) -> int:
        """Of training to a rung and the evaluation there."""
        return self.train(strategy, self.stretch_tokens(rung, reached)) + self.evaluation(strategy, self.read_at(rung))

    @property
    def cache(self) -> int:
        """Of the teacher's outputs for the plan's tokens, and of its own score and rows."""
        return 2 * self._teacher.parameters * self._plan.tokens

    @property
    def teacher_rows(self) -> int:
        """Of the teacher's score and its row under one deployment."""
        return 2 * self._teacher.parameters * self._plan.eval_tokens

    def online(self, tokens: int) -> int:
        """Of the teacher run beside the student."""
        return 2 * self._teacher.parameters * tokens


@dataclass(frozen=True, kw_only=True)
class Step:
    """What was known after a piece of a search's work.

    Attributes:
        operations, seconds: Spent up to here, on everything.
        value: Of the metric, of a student at full fidelity that fits; None for other work.
        row_id: Of its row.
    """

    operations: int
    seconds: float
    value: float | None = None
    row_id: str = ""


def steps_of(events: Sequence[Mapping[str, Any]], costs: Costs, deployments: int) -> Iterator[Step]:
    """A search's log as what it spent and what it knew, piece by piece, cache and teacher included.

    Args:
        events: The log, of one session or of several.
        costs: Of its plan.
        deployments: Under which the teacher was scored.
    """
    operations = costs.cache + (1 + deployments) * costs.teacher_rows
    seconds = 0.0
    strategies: dict[str, Strategy] = {}
    reached: dict[str, int] = {}
    rows = {row.row_id: row for row in rows_of(events)}
    pending: list[Row] = []
    for event in events:
        if event["event"] == "trial":
            strategies[event["trial"]] = Strategy.from_json(event["strategy"])
        elif event["event"] == "row" and event["row"]["kind"] != "teacher":
            row = rows[event["row"]["row_id"]]
            pending.append(row)
            if row.trial in reached and row.full and reached[row.trial] == len(costs._plan.rungs) - 1:
                # A further deployment of a trained student.
                operations += costs.evaluation(strategies[row.trial], costs._plan.eval_tokens)
                yield _step(operations, seconds, row)
        elif event["event"] == "rung":
            trial = event["trial"]
            operations += costs.stretch(strategies[trial], event["rung"], reached.get(trial, -1))
            seconds += sum(event["seconds"].values())
            reached[trial] = event["rung"]
            row = next(row for row in reversed(pending) if row.trial == trial)
            yield _step(operations, seconds, row)


def _step(operations: int, seconds: float, row: Row) -> Step:
    value = row.figure(METRIC) if row.full and row.feasible else None
    return Step(operations=operations, seconds=seconds, value=value, row_id=row.row_id)
