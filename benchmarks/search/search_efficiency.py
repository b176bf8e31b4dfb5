"""What a search finds for its compute, against random search, an afternoon's script, a tuned recipe and fine-tuning.

    python -m benchmarks.search.search_efficiency [--seeds 50] [--real 1] [--time 10m]

All arms have the same space, data, teacher and tokens. (a) is this search. (b) is random search whose trials all go to
the end. (c) is what a good engineer writes in an afternoon: Optuna's TPE and median pruner, the teacher live in each
trial, nothing shared. (d) is the hand-designed recipe, whose learning rate and then seed are chosen with as much
compute as (a) spends. (e) is fine-tuning without a teacher, chosen likewise. All of them begin with the recipe, look
sizes up before they train, and train nothing twice.

Students are those that `math_table.py` trained and recorded. A trial is looked up, and costs the operations and seconds
that its training took. `timed_parts.py` timed the parts that the table lacks. `--real` searches that train show that
the table has what a search would have seen: every value is compared. The chosen students are then scored on the unseen
test split. Existing results are not made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import optuna
import torch

from autodistill.data.dataset import load_split
from autodistill.distillation.student.check import student_spec
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import evaluate
from autodistill.evaluation.statistics import per_document
from autodistill.models.loading import load_model
from autodistill.models.spec import ModelSpec
from autodistill.options import cache_folder
from autodistill.runs.events import RunEvent, RungReached, TrialAdded, of_kind
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.algorithms.successive_halving import kept_at_rungs
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.runners.inline import run_inline
from autodistill.strategy.dimension import Point
from autodistill.strategy.domains import Choices, Range
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy
from autodistill.utils.hashing import content_hash
from benchmarks.common import math_table, report, timed_parts
from benchmarks.common.curves import at
from benchmarks.common.expenses import Expense
from benchmarks.common.math_search import METRIC, RECIPE, TEST_QUESTIONS, prepare
from benchmarks.common.math_table import FURTHER_SEEDS, RUNGS, Recorder, without_teacher
from benchmarks.common.math_teacher import LENGTH
from benchmarks.common.prepared import Prepared
from benchmarks.common.program import parse, parser_of
from benchmarks.common.recorded import SEED, TRIALS, Table, load_table
from benchmarks.common.report import Kept
from benchmarks.common.simulate import Memory, Spent, Worker, default_rungs, plan, simulate
from benchmarks.search.search_efficiency_report import Known, Outcome, sections

# Results also depend on this version. If it changes, they are made again.
VERSION = 2
# The other arms are followed for this many times (a)'s expense, to see when they catch up.
FOLLOWED = 8
# Proposals after which the script gives up. By then most of them are already trained, or too large.
ASKED = 300


def search(table: Table, seed: int) -> list[Known]:
    """Run (a): this search with its defaults, to the end of its plan."""
    spent, _ = simulate(table, plan(TRIALS, default_rungs(), kept_at_rungs(TRIALS, 3)), seed=seed)
    return curve_of(spent)


def random_search(table: Table, seed: int, limit: Expense) -> list[Known]:
    """Run (b): random search with every trial trained to the end, one cache, and rejection of what does not fit."""
    made = plan(len(table.recorded), (RUNGS[-1],), ())
    spent, _ = simulate(table, made, sampler="random", seed=seed, sharing=False, limit=limit)
    return curve_of(spent)


def curve_of(spent: Spent) -> list[Known]:
    """Return what a simulated search knew about students at full fidelity."""
    return [
        Known(operations=operations, seconds=seconds, value=value, strategy=strategy, seed=SEED, deployment=deployment)
        for operations, seconds, value, strategy, deployment in spent.curve
    ]


def script(table: Table, seed: int, limit: Expense) -> list[Known]:
    """Return what a script that only uses Optuna knows, and at which expense."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = plan(1, RUNGS, (1,) * (len(RUNGS) - 1))
    expenses = Worker(table, made).expenses
    spent = expenses.teacher_rows
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner())
    recipe = table.space.point(table.space.baselines[RECIPE])
    assert recipe is not None
    study.enqueue_trial(recipe)
    done: dict[str, float | None] = {}
    curve: list[Known] = []
    whole = {line.id for line in table.recorded}
    for _ in range(ASKED):
        if spent.covers(limit) or whole <= done.keys():
            break
        trial = study.ask()
        strategy = table.space.strategy(suggest(trial, table.space))
        line = table.lines.get(strategy.id)
        if strategy.id in done or line is None:  # too large, or proposed again, which would waste a training
            value = done.get(strategy.id)
            study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.PRUNED)
            continue
        done[strategy.id] = None
        before, pruned = 0, False
        for place, tokens in enumerate(RUNGS):
            spent += expenses.train(strategy, tokens - before, live=True)
            spent += expenses.evaluation(strategy, expenses.costs.read_at(place))
            before = tokens
            if tokens < RUNGS[-1]:
                trial.report(line.plain[place], tokens)
                pruned = trial.should_prune()
                if pruned:
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    break
        if pruned:
            continue
        best = max(line.rows, key=lambda name: line.rows[name])
        spent += expenses.evaluation(strategy, made.eval_tokens) * (len(line.rows) - 1)
        done[strategy.id] = line.rows[best]
        study.tell(trial, line.rows[best])
        curve.append(Known.of(spent, line.rows[best], strategy.id, SEED, best))
    return curve


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """Return a point of the space, as a script asks Optuna for one."""
    point: Point = {}
    for dimension in space.dimensions:
        if dimension.active(point):
            domain, path = dimension.domain, dimension.path
            if isinstance(domain, Choices):
                point[path] = trial.suggest_categorical(path, domain.grid)
            else:
                assert isinstance(domain, Range)
                found = trial.suggest_float(path, domain.low, domain.high, step=domain.step, log=domain.log)
                point[path] = domain.snap(found)
    return point


def tuned(table: Table, recipe: Strategy, limit: Expense, *, taught: bool) -> list[Known]:
    """Run (d) or (e): a recipe at each learning rate, its own first, and then the best of them on further seeds."""
    expenses = Worker(table, plan(1, (RUNGS[-1],), ())).expenses
    spent = expenses.teacher_rows + (expenses.cache if taught else Expense())
    curve: list[Known] = []

    def train(strategy: Strategy, seed: int) -> None:
        nonlocal spent
        line = table.every[strategy.id, seed]
        spent += expenses.whole(strategy)
        name = max(line.rows, key=lambda one: line.rows[one])
        curve.append(Known.of(spent, line.rows[name], line.id, seed, name))

    rates = sorted(table.space.dimensions[1].domain.corners, key=lambda rate: rate != recipe.distillation.learning_rate)
    for rate in rates:
        train(replace(recipe, distillation=replace(recipe.distillation, learning_rate=float(rate))), SEED)
    best = max(curve, key=lambda one: one.value).strategy
    for seed in FURTHER_SEEDS:
        if not spent.covers(limit) and (best, seed) in table.every:
            train(Strategy.from_json(table.every[best, seed].strategy), seed)
    return curve


class Judge:
    """Scores recorded students on the test split.

    Args:
        prepared: The search that has the data and shapes.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._recorder = Recorder(prepared)
        self._setting = prepared.setting
        self._deployments = {one.name: one for one in prepared.question.deployments}
        self._data = load_split(prepared.setting.data, "test").head(TEST_QUESTIONS * LENGTH)

    def judge(self, strategy: Strategy, seed: int, deployment: str) -> dict[str, Any]:
        """Return the test scores of a strategy's student in a deployment."""
        spec = student_spec(strategy, self._setting.teacher_spec)
        return self._score(self._recorder.student(strategy, seed), spec, deployment)

    def teacher(self) -> dict[str, Any]:
        """Return the test scores of the unmodified teacher, in 16 bits."""
        return self._score(load_model(self._setting.teacher, torch.float32), self._setting.teacher_spec, "huggingface")

    def _score(self, model: Any, spec: ModelSpec, deployment: str) -> dict[str, Any]:
        names, packing, budget = (METRIC, "exact_match"), self._deployments[deployment], self._setting.budget
        found, scores = evaluate(
            model, Subject(spec=spec, deployment=packing, budget=budget), self._data, None, evaluators=names
        )
        tokens, answers = per_document(scores.correct, scores.documents), found.documents["others"]["exact_match"]
        return {
            **{name: found.measurements[name].value for name in names},
            "count": tokens["count"],
            "tokens": tokens["sum"],
            "answers": answers["sum"],
            "asked": answers["count"],
        }


def real(table: Table, prepared: Prepared, seed: int) -> dict[str, float]:
    """Run a search that trains, and compare it value by value with the same search from the table."""
    made = replace(prepared.setting.plan, trials=TRIALS, rungs=default_rungs(), keep=kept_at_rungs(TRIALS, 3))
    question = replace(prepared.question, plan=made, space=table.space)
    setting = replace(prepared.setting, plan=made, evaluators=(METRIC, "memory", "size"))
    sampler = Sampler(table.space, seed=seed)
    campaign = Campaign(question, sampler=sampler, log=prepared.run.events, checkpoints=prepared.run.checkpoints)
    campaign.replay(prepared.run.events.all())
    run_inline(campaign, setting, None)
    looked_up = Memory()
    simulate(table, made, seed=seed, log=looked_up)
    trained = prepared.run.events.all()
    mine, theirs = (dict(_told(events)) for events in (trained, looked_up.all()))
    same = sum(mine.get(key) == value for key, value in theirs.items())
    off = max((abs(mine[key] - value) for key, value in theirs.items() if key in mine), default=0.0)
    compared = {"segments": len(theirs), "same": same, "others": len(mine.keys() - theirs.keys()), "off": off}
    return compared | stretch_seconds(trained)


def stretch_seconds(events: Sequence[RunEvent]) -> dict[str, float]:
    """Return the seconds of a log's segments, by kind of work."""
    told = [event.seconds for event in of_kind(events, RungReached)]
    return {part: sum(float(one[part]) for one in told) for part in ("train", "evaluate", "other")}


def _told(events: Sequence[RunEvent]) -> Iterator[tuple[str, float]]:
    strategies = {event.trial: event.strategy.id for event in of_kind(events, TrialAdded) if event.strategy}
    for event in of_kind(events, RungReached):
        yield f"{event.trial} {strategies[event.trial]} {event.rung}", event.value


def main() -> None:
    """Replay every arm by seed, check the table with real searches, and write the report."""
    parser = parser_of(__doc__, seeds=50, time=True)
    parser.add_argument("--real", type=int, default=1, help="searches that train, to hold the table to")
    arguments = parse(parser, seeds=1, real=0)
    if arguments.smoke:
        math_table.make_small()
    torch.set_num_threads(1)
    table = load_table()
    recorded = [
        [one.id, one.seed, *one.decayed, one.train_seconds, one.evaluate_seconds] for one in table.every.values()
    ]
    source = content_hash([VERSION, table.digest, sorted(recorded), asdict(timed_parts.read())])
    kept = Kept("search-efficiency", source, arguments.time)
    seeds = range(arguments.seeds)

    def curves(name: str, make: Any) -> list[list[Known]]:
        found = [kept.get(f"{name} {seed}", lambda seed=seed: [vars(one) for one in make(seed)]) for seed in seeds]
        return [[Known(**one) for one in curve] for curve in found]

    arms = {"a": curves("a", lambda seed: search(table, seed))}
    ends = [curve[-1] for curve in arms["a"]]
    box = Expense(
        operations=float(np.mean([one.operations for one in ends])),
        seconds=float(np.mean([one.seconds for one in ends])),
    )
    arms["b"] = curves("b", lambda seed: random_search(table, seed, box * FOLLOWED))
    arms["c"] = curves("c", lambda seed: script(table, seed, box * FOLLOWED))
    recipe = table.space.baselines[RECIPE]
    arms["d"] = [tuned(table, recipe, box, taught=True)]
    arms["e"] = [tuned(table, without_teacher(recipe), box, taught=False)]
    runs = cache_folder() / "benchmarks" / "runs"
    checks = []
    for seed in range(arguments.real):
        with prepare(runs, f"efficiency-{table.digest}-{seed}", trials=TRIALS) as prepared:
            checks.append(kept.get(f"real {seed}", lambda seed=seed, one=prepared: real(table, one, seed)))
    with prepare(runs, f"table-{RUNGS[-1]}") as prepared:
        judge = Judge(prepared)
        by_id = {line.id: Strategy.from_json(line.strategy) for line in table.every.values()}

        def tested(one: Known) -> dict[str, Any]:
            key = f"test split {one.strategy} {one.seed} {one.deployment} {TEST_QUESTIONS}"
            return kept.get(key, lambda: judge.judge(by_id[one.strategy], one.seed, one.deployment))

        chosen = {name: [at(curve, box.operations) or curve[0] for curve in found] for name, found in arms.items()}
        untuned = arms["d"][0][0]
        test = {name: [tested(one) for one in found] for name, found in chosen.items()}
        test["d, untuned"] = [tested(untuned)]
        test["teacher"] = [kept.get("test split teacher", judge.teacher)]
    path = report.write(
        "search-efficiency",
        "What a search finds for its compute",
        sections(
            Outcome(
                table=table,
                arms=arms,
                box=box,
                followed=FOLLOWED,
                chosen=chosen,
                test=test,
                checks=checks,
            )
        ),
    )
    print(path)


if __name__ == "__main__":
    main()
