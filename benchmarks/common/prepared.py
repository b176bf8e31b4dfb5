"""A search prepared up to its first trial, as `autodistill search` does it, and the operations that its work costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autodistill.distillation.losses.attention import teacher_layer
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.trainer import Trainer
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import evaluate
from autodistill.models.spec import ModelSpec
from autodistill.runs.phase_clock import Clock
from autodistill.runs.run_folder import RunFolder
from autodistill.search.campaign.observer import Observer
from autodistill.search.campaign.state import Question
from autodistill.search.planning.placement import Place
from autodistill.search.prepare import plan_run, prepare_rows, prepare_trials
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.worker.begin import initial_student
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a search has ready before its first trial."""

    question: Question
    setting: TrialSetting
    run: RunFolder
    seconds: float

    @property
    def space(self) -> Space:
        """The search space."""
        return self.question.space

    @property
    def costs(self) -> Costs:
        """The operations that the work of this search takes."""
        return Costs(self.setting.teacher_spec, self.question.plan)


@contextmanager
def prepared(request: SearchRequest, **planned: Any) -> Iterator[Prepared]:
    """Load, plan, cache and score as a search does, on one thread. An existing run of this name is continued.

    Args:
        request: The request. It names its run, whose folder is locked within the block.
        planned: Fields of the plan that replace those a search would choose.
    """
    began = time.perf_counter()
    assert request.name is not None
    resume = (Path(request.runs) / request.name / "search.json").exists()
    config = check_request(replace(request, resume=resume))
    out, name = Path(request.runs), request.name
    with RunFolder.open(out, name, lock=True) if resume else RunFolder.create(out, name) as run:
        clock = Clock(time.monotonic(), lambda text: None)
        found = plan_run(config, Place.local(), run, clock, Observer())
        plan = replace(found.plan, **{"threads": 1, "workers": 1, **planned})
        found = replace(found, plan=plan)
        ready = prepare_trials(found, prepare_rows(found, run, clock), run, clock, Observer())
        yield Prepared(question=ready.question, setting=ready.setting, run=run, seconds=time.perf_counter() - began)


class Costs:
    """Counts the operations of trials: 6 for each weight and trained token, 2 for each weight and token that is read.

    An evaluation reads its tokens once.

    Args:
        teacher: The teacher's shape.
        plan: The plan with its rungs, batch and evaluation tokens.
    """

    def __init__(self, teacher: ModelSpec, plan: Plan) -> None:
        self._teacher = teacher
        self._plan = plan

    @property
    def rungs(self) -> tuple[int, ...]:
        """The plan's rungs, in tokens."""
        return self._plan.rungs

    def weights(self, strategy: Strategy) -> int:
        """Return the weights of the student, and of the projections of its states that are trained with it."""
        spec = student_spec(strategy, self._teacher)
        alignment = strategy.distillation.alignment
        projected = (
            alignment.count * spec.width * self._teacher.width if alignment and alignment.projection != "none" else 0
        )
        return spec.parameters + projected

    def branch(self, rung: int) -> int:
        """Return the tokens at which the decay towards a rung leaves the stable part. It is 0 for -1, the start."""
        plan = self._plan
        return branch_point(plan.rungs[rung], plan.decay, plan.batch_tokens) if rung >= 0 else 0

    def stretch_tokens(self, rung: int, reached: int) -> int:
        """Return the tokens trained from the rung `reached` (-1: none) to a higher one, with one decay at its end."""
        return self._plan.rungs[rung] - self.branch(reached)

    def train(self, strategy: Strategy, tokens: int) -> int:
        """Return the operations of training on this many tokens."""
        return 6 * self.weights(strategy) * tokens

    def evaluation(self, strategy: Strategy, tokens: int) -> int:
        """Return the operations of reading this many tokens."""
        return 2 * student_spec(strategy, self._teacher).parameters * tokens

    def read_at(self, rung: int) -> int:
        """Return the tokens that are read at a rung."""
        plan = self._plan
        return plan.eval_tokens if rung == len(plan.rungs) - 1 else plan.rung_eval_tokens

    def segment(self, strategy: Strategy, rung: int, reached: int) -> int:
        """Return the operations of training to a rung and of the evaluation there."""
        return self.train(strategy, self.stretch_tokens(rung, reached)) + self.evaluation(strategy, self.read_at(rung))

    @property
    def cache(self) -> int:
        """Operations of the teacher's outputs for the plan's tokens."""
        return 2 * self._teacher.parameters * self._plan.tokens

    @property
    def teacher_rows(self) -> int:
        """Operations of the teacher's score, or of its row under one deployment."""
        return 2 * self._teacher.parameters * self._plan.eval_tokens

    def online(self, tokens: int) -> int:
        """Return the operations of running the teacher on this many tokens."""
        return 2 * self._teacher.parameters * tokens


def new_trainer(bench: Workbench, strategy: Strategy, seed: int) -> tuple[Any, Trainer]:
    """Return an untrained student and its trainer, made as a search's worker makes them."""
    spec, attention = bench.setting.teacher_spec, strategy.distillation.attention
    model, kept = initial_student(bench.setting, strategy.init, seed)
    trainer = Trainer(
        model,
        teaching=Teaching(
            kept_layers=kept,
            layers=spec.layers,
            width=spec.width,
            cache=bench.cache,
            block=bench.teacher_block(teacher_layer(attention, spec.layers)) if attention else None,
            live=bench.teacher,
        ),
        strategy=strategy,
        plan=bench.setting.plan,
        data=bench.train,
        seed=seed,
    )
    return model, trainer


def accuracy(bench: Workbench, strategy: Strategy, model: Any, deployment: Deployment, tokens: int) -> float:
    """Return a student's accuracy on this many validation tokens, as a deployment holds it."""
    data, reference = bench.held_out(tokens)
    spec, budget = student_spec(strategy, bench.setting.teacher_spec), bench.setting.budget
    found, _ = evaluate(
        model, Subject(spec=spec, deployment=deployment, budget=budget), data, reference, evaluators=("accuracy",)
    )
    return found.measurements["accuracy"].value


def learns_from_teacher(strategy: Strategy) -> bool:
    """Return whether a strategy reads anything from the teacher while it trains."""
    return strategy.distillation.weighs_teacher or strategy.distillation.alignment is not None
