"""What a search finds for its compute on the 135M teacher: `search_efficiency.py` in small, with everything trained.

    python -m benchmarks.search.search_smollm2 [--seeds 3] [--tokens 6144] [--time 30m]

All arms have the default space with llama.cpp's deployments alone, the default data and teacher, and the same tokens at
full fidelity. (a) is this search with its defaults, and also without the start that the space names. (c) is what a good
engineer writes in an afternoon: Optuna's TPE and median pruner, the teacher live in each trial, nothing shared. It also
runs with that start. (d) is the hand-designed recipe, whose learning rate and then seed are chosen with as much compute
as (a) spends. (e) is fine-tuning of the recipe's student without a teacher, chosen likewise. (a) and (c) begin with the
recipe.

The script is followed to the end of (a)'s box, and on until it has passed the tuned recipe, or had five times the
compute at which (a) did. With the start, it is followed only until it has passed. Every student that is the best so far
of its arm is scored on the unseen test split, which is not charged. So is, for each (a), the best student that a rung
judged after at most 60% of the recipe's training. Existing results are not made again; an arm that is broken off begins
anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from autodistill.data.dataset import load_split
from autodistill.distillation.student.check import probe_deployment, student_spec, with_own
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import evaluate
from autodistill.evaluation.statistics import per_document
from autodistill.hardware.budget import CONTEXT, Budget
from autodistill.models.loading import load_model
from autodistill.options import cache_folder
from autodistill.runs.students import student_folder
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.request.request import SearchRequest
from autodistill.search.worker.attempt import Assignment, attempt, work
from autodistill.search.worker.context import Workbench
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.utils.hashing import content_hash
from autodistill.utils.yaml_files import read_yaml
from benchmarks.common import report
from benchmarks.common.curves import FIFTH, passes
from benchmarks.common.math_table import decay, exhaust, without_teacher
from benchmarks.common.prepared import Prepared, accuracy, learns_from_teacher, new_trainer, prepared
from benchmarks.common.program import parse, parser_of, tiny_data, tiny_teacher, token_count
from benchmarks.common.report import Kept
from benchmarks.common.simulate import Memory
from benchmarks.common.timed_parts import live
from benchmarks.search.search_efficiency import suggest
from benchmarks.search.search_smollm2_report import ARMS, Known, sections

TRIALS, METRIC, RECIPE = 12, "accuracy", "hand_designed"
TEST_TOKENS = 8192
# Factors of the recipe's learning rate, its own first.
RATES = (1.0, 2.0, 0.5, 4.0)
# The share of the recipe's training for a student that is trained in 40% less.
SHORT = 0.6
# Proposals after which the script gives up.
ASKED = 100


class Bench:
    """Measures an arm on this machine: what it spends, and how good its students are.

    Args:
        ready: Teacher, data, cache and plan.
        spent: Operations before the first trial.
        seconds: Seconds before the first trial.
    """

    def __init__(self, ready: Prepared, spent: float, seconds: float) -> None:
        self.ready, self.workbench = ready, Workbench(ready.setting)
        self.plan, self.costs = ready.setting.plan, ready.costs
        self.known: list[Known] = []
        self._operations, self._seconds, self._since = spent, seconds, time.process_time()
        self._test = load_split(ready.setting.data, "test").head(TEST_TOKENS)

    @property
    def operations(self) -> float:
        """Operations spent so far."""
        return self._operations

    def spend(self, operations: float) -> None:
        """Add these operations, and the processor seconds since the last call."""
        now = time.process_time()
        self._operations, self._seconds, self._since = (
            self._operations + operations,
            self._seconds + now - self._since,
            now,
        )

    def note(self, strategy: Strategy, value: float | None, model: Callable[[], Any], deployment: Deployment) -> None:
        """Record a trained student. Score it on test if it is the best so far."""
        best = max((one.value for one in self.known if one.value is not None), default=-1.0)
        test = self._judge(strategy, model(), deployment) if value is not None and value > best else None
        train, name = self.costs.train(strategy, self.plan.tokens), f"{strategy.describe()} as {deployment.name}"
        self._add(value=value, name=name, train=train, test=test)

    def note_judged(self, value: float) -> None:
        """Record a rung's judgement of a student."""
        self._add(judged=value)

    def note_short(self, strategy: Strategy, value: float, tokens: int, folder: Path, deployment: Deployment) -> None:
        """Record a student whose training ended at a rung, and score it on test."""
        test = self._judge(strategy, load_model(folder, torch.float32), deployment)
        train, name = self.costs.train(strategy, tokens), f"{strategy.describe()} as {deployment.name}"
        self._add(judged=value, name=name, train=train, test=test)

    def note_end(self) -> None:
        """Record the state at the end."""
        self.spend(0)
        self._add()

    def _add(self, **known: Any) -> None:
        """Record the state with what was spent so far. Scoring on test is not charged."""
        self.known.append(Known(operations=self._operations, seconds=self._seconds, **known))
        self._since = time.process_time()

    def _judge(self, strategy: Strategy, model: Any, deployment: Deployment) -> dict[str, list[float]]:
        spec, budget = student_spec(strategy, self.ready.setting.teacher_spec), self.ready.setting.budget
        _, scores = evaluate(
            model, Subject(spec=spec, deployment=deployment, budget=budget), self._test, None, evaluators=(METRIC,)
        )
        found = per_document(scores.correct, scores.documents)
        return {name: [float(number) for number in found[name]] for name in ("count", "sum")}

    def train(self, strategy: Strategy, seed: int, judge: Callable[[float, int], bool]) -> float | None:
        """Train straight to the end, and return the student's value.

        Each rung judges the student without a decay. The result is None if the judge ends the training.
        """
        plan = self.plan
        model, trainer = new_trainer(self.workbench, strategy, seed)
        probe = probe_deployment(strategy, with_own(strategy, self.ready.question.deployments))
        live = strategy.distillation.signal == "online" and learns_from_teacher(strategy)
        before = 0
        for rung in plan.rungs:
            last = rung == plan.rungs[-1]
            exhaust(trainer.train_stable(self.costs.branch(len(plan.rungs) - 1) if last else rung))
            if last:
                exhaust(decay(trainer, strategy, rung, self.ready))
            read = plan.eval_tokens if last else plan.rung_eval_tokens
            value = accuracy(self.workbench, strategy, model, probe, read)
            self.spend(
                self.costs.train(strategy, rung - before)
                + (self.costs.online(rung - before) if live else 0)
                + self.costs.evaluation(strategy, read)
            )
            before = rung
            if not last:
                self.note_judged(value)
                if not judge(value, rung):
                    return None
        self.note(strategy, value, lambda: model, probe)
        return value


@contextmanager
def ready(tokens: int, trials: int, context: int = CONTEXT, **inputs: str) -> Iterator[Prepared]:
    """Yield what all arms share before the first trial. A cache of its own shows what this takes."""
    folder = cache_folder() / "benchmarks" / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    space = read_yaml(Path(__file__).parents[2] / "search_spaces" / "declared.yaml")
    space["deployments"] = [one for one in space["deployments"] if one["runtime"] == "llama.cpp"]
    (folder / "space.yaml").write_text(json.dumps(space))
    request = SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=context),
        space=str(folder / "space.yaml"),
        trials=trials,
        tokens=tokens,
        # A run has one space, which may change between calls.
        name=f"tokens-{tokens}-{content_hash(space)}",
        runs=folder,
        runner="inline",
        cache=folder / "cache",
        **inputs,
    )
    with prepared(request) as one:
        yield one


@contextmanager
def checkpoints(one: Prepared) -> Iterator[Prepared]:
    """Yield the same with temporary checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        yield replace(one, setting=replace(one.setting, checkpoints=Path(folder)))


def search(whole: Prepared, seed: int, seconds: float, *, start: bool) -> list[Known]:
    """Run (a): the search itself, assignment by assignment."""
    with checkpoints(whole) as one:
        space = one.space if start else replace(one.space, starts={})
        plan = replace(one.question.plan, seed=seed)
        one = replace(one, setting=replace(one.setting, plan=plan))
        question = replace(one.question, space=space, plan=plan)
        bench = Bench(one, one.costs.cache + (1 + len(one.question.deployments)) * one.costs.teacher_rows, seconds)
        campaign = Campaign(
            question, sampler=Sampler(space, seed=seed), log=Memory(), checkpoints=one.setting.checkpoints
        )
        recipe = one.costs.train(one.space.baselines[RECIPE], plan.tokens)
        short: list[tuple[float, Assignment]] = []
        while (assignment := campaign.next()) is not None:
            outcome = attempt(partial(work, bench.workbench, assignment, lambda _: None))
            campaign.take(assignment, outcome)
            told, strategy = outcome.get("report"), assignment.task.strategy
            if told is None:
                continue
            last = told.rung == len(bench.plan.rungs) - 1
            read = bench.plan.eval_tokens if last else bench.plan.rung_eval_tokens
            bench.spend(bench.costs.train(strategy, told.trained) + bench.costs.evaluation(strategy, read))
            value = told.evaluation.measurements[METRIC].value
            if last:
                folder = student_folder(one.setting.checkpoints / assignment.task.id)
                bench.note(
                    strategy, value, lambda folder=folder: load_model(folder, torch.float32), told.evaluation.deployment
                )
                continue
            bench.note_judged(value)
            if one.costs.train(strategy, told.tokens) <= SHORT * recipe:
                short.append((value, assignment))
        value, assignment = max(short, key=lambda pair: pair[0])
        tokens, task = plan.rungs[assignment.rung], assignment.task
        # It is trained again to the same bits, as a search does if no trial reaches the end. Like tests, this is not
        # charged.
        work(bench.workbench, replace(assignment, keep=True), lambda _: None)
        folder = student_folder(one.setting.checkpoints / task.id, tokens)
        bench.note_short(task.strategy, value, tokens, folder, task.probe)
        campaign.close()
        bench.note_end()
    return bench.known


def script(
    one: Prepared,
    seed: int,
    seconds: float,
    ends: Callable[[Sequence[Known], float], bool],
    *,
    told: bool,
) -> list[Known]:
    """Return what a script that only uses Optuna knows, and at which expense."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    bench = Bench(one, one.costs.teacher_rows, seconds)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner())
    for first in (one.space.baselines[RECIPE], *(one.space.starts.values() if told else ())):
        point = one.space.point(first)
        assert point is not None
        study.enqueue_trial(point)
    done: dict[str, float | None] = {}
    for _ in range(ASKED):
        if ends(bench.known, bench.operations):
            break
        trial = study.ask()
        strategy = live(one.space.strategy(suggest(trial, one.space)))
        if strategy.id not in done:

            def judge(value: float, rung: int, trial: optuna.Trial = trial) -> bool:
                trial.report(value, rung)
                return not trial.should_prune()

            done[strategy.id] = bench.train(strategy, seed, judge)
        value = done[strategy.id]
        study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.PRUNED)
    bench.note_end()
    return bench.known


def tuned(one: Prepared, limit: float, seconds: float, *, taught: bool) -> list[Known]:
    """Run (d) or (e): a recipe at each learning rate, its own first, and then the best of them on further seeds."""
    recipe = one.space.baselines[RECIPE]
    if not taught:
        recipe = without_teacher(replace(recipe, distillation=replace(recipe.distillation, alignment=None)))
    bench = Bench(one, one.costs.teacher_rows + (one.costs.cache if taught else 0), seconds)
    own, found = recipe.distillation.learning_rate, []
    for rate in RATES:
        strategy = replace(recipe, distillation=replace(recipe.distillation, learning_rate=rate * own))
        found.append((bench.train(strategy, 0, lambda value, rung: True) or 0.0, strategy))
    best, seed = max(found, key=lambda pair: pair[0])[1], 0
    each = (bench.operations - one.costs.teacher_rows) / len(RATES)
    while bench.operations + each <= limit:
        seed += 1
        bench.train(best, seed, lambda value, rung: True)
    bench.note_end()
    return bench.known


def is_over(found: Sequence[Known], spent: float, *, box: float, follow: float, target: float) -> bool:
    """Return whether an arm has spent enough: all, or its box once it has passed the target."""
    return spent >= follow or (spent >= box and bool(np.isfinite(passes(found, target))))


def main() -> None:
    """Run every arm on the 135M teacher, as far as the time allows, and write the report."""
    parser = parser_of(__doc__, seeds=3, time=True)
    parser.add_argument("--tokens", type=token_count, default=6144, help="of training at full fidelity")
    arguments = parse(parser, seeds=1, tokens=1024)
    inputs, trials = {}, TRIALS
    if arguments.smoke:
        inputs, trials = {"teacher": tiny_teacher(layers=12), "data": tiny_data(60), "context": 256}, 3
    torch.set_num_threads(1)
    began = time.process_time()
    with ready(arguments.tokens, trials, **inputs) as one:
        passed = time.process_time() - began
        parts = [one.space.to_json(), asdict(one.question.plan), one.question.budget.memory_bytes]
        kept = Kept("search-smollm2", content_hash(parts), arguments.time)
        arms = trained(one, kept, passed, range(arguments.seeds))
        plan, count = one.question.plan, len(one.space.dimensions)
    title = "What a search finds for its compute, on the 135M teacher"
    print(report.write("search-smollm2", title, sections(arms, plan, count, TEST_TOKENS)))


def trained(one: Prepared, kept: Kept, passed: float, seeds: Sequence[int]) -> dict[str, list[list[Known]]]:
    """Return every arm's runs, as far as the time allows.

    Args:
        one: What all arms share.
        kept: Results of earlier calls.
        passed: Seconds that `one` took. In the first call it made everything.
        seeds: Seeds of proposals and students.
    """

    def arm(name: str, seed: int, make: Callable[[], list[Known]]) -> list[Known]:
        began = time.monotonic()
        found = [Known(**item) for item in kept.get(f"{name} {seed}", lambda: [asdict(item) for item in make()])]
        best = max(item.value or 0.0 for item in found)
        print(f"{name}, seed {seed}: {best:.4f}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return found

    before = kept.get("preparation", lambda: passed)
    arms: dict[str, list[list[Known]]] = {name: [] for name in ARMS}
    for seed in seeds:
        mine = arm("a", seed, partial(search, one, seed, before, start=True))
        if seed == 0:
            arms["d"] = [arm("d", 0, partial(tuned, one, mine[-1].operations, before, taught=True))]
        box, target = mine[-1].operations, max(item.value or 0.0 for item in arms["d"][0])
        # The script's seconds leave out the loading of teacher and data, a part of `before` that was not measured
        # alone.
        follow = max(box, FIFTH * min(passes(mine, target), box))
        ends = partial(is_over, box=box, follow=follow, target=target)
        theirs = arm("c", seed, partial(script, one, seed, 0.0, ends, told=False))
        other = arm("a, no start", seed, partial(search, one, seed, before, start=False))
        told = arm("c, told", seed, partial(script, one, seed, 0.0, partial(ends, box=0.0), told=True))
        for name, curve in (("a", mine), ("a, no start", other), ("c", theirs), ("c, told", told)):
            arms[name].append(curve)
    arms["e"] = [arm("e", 0, partial(tuned, one, arms["a"][0][-1].operations, 0.0, taught=False))]
    return arms


if __name__ == "__main__":
    main()
