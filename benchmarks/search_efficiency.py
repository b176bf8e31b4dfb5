"""What a search finds for its compute, against random search, an afternoon's script, a tuned recipe and fine-tuning.

    python benchmarks/search_efficiency.py [--seeds 50] [--real 1] [--time 10m]

The same space, data, teacher and tokens for (a) this search, (b) random search whose trials all go to the end, (c) what
a good engineer writes in an afternoon: Optuna's TPE and median pruner, the teacher live in each trial, nothing shared,
(d) the hand-designed recipe, its learning rate and then its seed chosen with as much compute as (a) spends, (e)
fine-tuning without a teacher, chosen likewise. All of them begin with the recipe, look sizes up before they train, and
train nothing twice. Students are those that `math_table.py` trained and recorded: a trial is looked up and costs what
training it did. That the table is what a search would have seen is shown by `--real` searches that train, whose every
value is compared. The chosen students are then scored on the unseen test split. What was made is not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import optuna
import report
import torch
from kept import Kept, mean
from math_search import METRIC, RECIPE, TEST_QUESTIONS, prepare
from math_table import FURTHER_SEEDS, RUNGS, Line, Recorder, read, student_file, without_teacher
from math_teacher import LENGTH
from prepared import Prepared, learns_from_teacher
from safetensors.torch import load_file
from simulate import SEED, TRIALS, Table, Worker, default_rungs, load_table, plan, simulate

from autodistill.applied import initial_student, student_spec
from autodistill.domains import Choices
from autodistill.evaluation import evaluate
from autodistill.records.leaderboard import paired_bootstrap
from autodistill.records.store import default_cache
from autodistill.search.campaign import Campaign
from autodistill.search.inline_runner import run_inline
from autodistill.search.plan import _keep
from autodistill.search.sampler import Sampler
from autodistill.space import Point, Space
from autodistill.statistics import per_document
from autodistill.strategy import Strategy, content_hash
from autodistill.token_sets import load_split
from autodistill.units import parse_duration

# How many times what (a) spends the others are followed, to see when they come as far.
FOLLOWED = 8
# Proposals after which the script is given up: most are then what it has trained before, or too large.
ASKED = 300
# How far below the best of the table a student counts as near it.
NEAR = 0.001
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Known:
    """A student at full fidelity, and what had been spent when it was known.

    Attributes:
        operations: On everything so far.
        value: Accuracy on validation.
        strategy, seed, deployment: Which student, and how it is packed.
    """

    operations: int
    value: float
    strategy: str
    seed: int
    deployment: str


def search(table: Table, seed: int) -> list[Known]:
    """(a): this search with its defaults, to the end of its plan."""
    spent, _ = simulate(table, plan(TRIALS, default_rungs(), _keep(TRIALS, 3)), seed=seed)
    return [
        Known(operations=one[0], value=one[2], strategy=one[3], seed=SEED, deployment=one[4]) for one in spent.curve
    ]


def random_search(table: Table, seed: int, limit: int) -> list[Known]:
    """(b): random search, every trial to the end, one cache, and what does not fit rejected."""
    made = plan(len(table.recorded), (RUNGS[-1],), ())
    spent, _ = simulate(table, made, sampler="random", seed=seed, sharing=False, limit=limit)
    return [
        Known(operations=one[0], value=one[2], strategy=one[3], seed=SEED, deployment=one[4]) for one in spent.curve
    ]


def script(table: Table, seed: int, limit: int) -> list[Known]:
    """(c): an afternoon's script."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = plan(1, RUNGS, (1,) * (len(RUNGS) - 1))
    costs, spent = Worker(table, made).costs, Worker(table, made).start - Worker(table, made).costs.cache
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner())
    recipe = table.space.point(table.space.baselines[RECIPE])
    assert recipe is not None
    study.enqueue_trial(recipe)
    done: dict[str, float | None] = {}
    curve: list[Known] = []
    whole = {line.id for line in table.recorded}
    for _ in range(ASKED):
        if spent >= limit or whole <= done.keys():
            break
        trial = study.ask()
        strategy = table.space.strategy(suggest(trial, table.space))
        line = table.lines.get(strategy.id)
        if strategy.id in done or line is None:  # too large, or the same again, which it had better not train twice
            value = done.get(strategy.id)
            study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.PRUNED)
            continue
        done[strategy.id] = None
        before, pruned = 0, False
        for place, tokens in enumerate(RUNGS):
            spent += costs.train(strategy, tokens - before) + costs.evaluation(strategy, costs.read_at(place))
            spent += costs.online(tokens - before) if learns_from_teacher(strategy) else 0
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
        spent += (len(line.rows) - 1) * costs.evaluation(strategy, made.eval_tokens)
        done[strategy.id] = line.rows[best]
        study.tell(trial, line.rows[best])
        curve.append(Known(operations=spent, value=line.rows[best], strategy=strategy.id, seed=SEED, deployment=best))
    return curve


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """A point by Optuna, one dimension after another."""
    point: Point = {}
    for dimension in space.dimensions:
        if dimension.active(point):
            assert isinstance(dimension.domain, Choices)
            point[dimension.path] = trial.suggest_categorical(dimension.path, dimension.domain.grid)
    return point


def tuned(table: Table, lines: Sequence[Line], recipe: Strategy, limit: int, *, taught: bool) -> list[Known]:
    """(d) and (e): a recipe at each learning rate, its own first, and then the best of them on further seeds."""
    made = plan(1, (RUNGS[-1],), ())
    worker = Worker(table, made)
    spent = worker.start - (0 if taught else worker.costs.cache)
    by = {(line.id, line.seed): line for line in lines}
    curve: list[Known] = []

    def train(strategy: Strategy, seed: int) -> None:
        nonlocal spent
        line = by[strategy.id, seed]
        spent += worker.costs.stretch(strategy, 0, -1)
        name = max(line.rows, key=lambda one: line.rows[one])
        curve.append(Known(operations=spent, value=line.rows[name], strategy=line.id, seed=seed, deployment=name))

    rates = sorted(table.space.dimensions[1].domain.corners, key=lambda rate: rate != recipe.distillation.learning_rate)
    for rate in rates:
        train(replace(recipe, distillation=replace(recipe.distillation, learning_rate=float(rate))), SEED)
    best = max(curve, key=lambda one: one.value).strategy
    for seed in FURTHER_SEEDS:
        if spent < limit and (best, seed) in by:
            train(Strategy.from_json(by[best, seed].strategy), seed)
    return [one for one in curve if one.operations <= 1.05 * limit]


def at(curve: Sequence[Known], operations: float) -> Known | None:
    """The best student that is known after so many operations."""
    return max((one for one in curve if one.operations <= operations), key=lambda one: one.value, default=None)


def first_above(curve: Sequence[Known], value: float) -> float:
    """Operations after which a student was better than this; infinite where none is."""
    return next((float(one.operations) for one in curve if one.value > value + 1e-12), float("inf"))


class Judge:
    """Scores recorded students on the test split; one whose weights are not on this machine is trained again.

    Args:
        prepared: Gives data and shapes.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._recorder = Recorder(prepared)
        self._setting = prepared.setting
        self._deployments = {one.name: one for one in prepared.question.deployments}
        self._data = load_split(prepared.setting.data, "test").head(TEST_QUESTIONS * LENGTH)

    def judge(self, strategy: Strategy, seed: int, deployment: str) -> dict[str, Any]:
        """Right tokens and answers of each question."""
        if not student_file(strategy, seed).exists():
            self._recorder.record([strategy], seed)
        model, _ = initial_student(self._setting, strategy.init, seed)
        model.load_state_dict(load_file(student_file(strategy, seed)), strict=False)
        names, packing = (METRIC, "exact_match"), self._deployments[deployment]
        spec = student_spec(strategy, self._setting.teacher_spec)
        budget = self._setting.budget
        found, scores = evaluate(model, spec, packing, self._data, None, budget=budget, evaluators=names)
        tokens = per_document(scores.correct, scores.documents)
        return {
            METRIC: found.measurements[METRIC].value,
            "exact_match": found.measurements["exact_match"].value,
            "count": tokens["count"],
            "tokens": tokens["sum"],
            "answers": found.documents["others"]["exact_match"]["sum"],
            "asked": found.documents["others"]["exact_match"]["count"],
        }


def real(table: Table, prepared: Prepared, seed: int) -> dict[str, int]:
    """A search that trains, compared value by value with the same search looked up."""
    made = replace(prepared.setting.plan, trials=TRIALS, rungs=default_rungs(), keep=_keep(TRIALS, 3))
    question = replace(prepared.question, plan=made, space=table.space)
    setting = replace(prepared.setting, plan=made, evaluators=(METRIC, "memory", "size"))
    sampler = Sampler(table.space, seed=seed)
    campaign = Campaign(question, sampler=sampler, log=prepared.run.events, checkpoints=prepared.run.checkpoints)
    campaign.replay(prepared.run.events.read())
    run_inline(campaign, setting, None)
    _, looked_up = simulate(table, made, seed=seed)
    mine, theirs = (dict(_told(events)) for events in (prepared.run.events.read(), looked_up._log.read()))
    same = sum(mine.get(key) == value for key, value in theirs.items())
    return {"stretches": len(theirs), "same": same, "others": len(mine.keys() - theirs.keys())}


def _told(events: Sequence[Any]) -> Iterator[tuple[str, float]]:
    strategies = {event["trial"]: event["strategy_id"] for event in events if event["event"] == "trial"}
    for event in events:
        if event["event"] == "rung":
            yield f"{event['trial']} {strategies[event['trial']]} {event['rung']}", event["value"]


def main() -> None:
    """Looks up, trains what is to be trained, scores test and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--real", type=int, default=1, help="searches that train, to hold the table to")
    parser.add_argument("--time", type=parse_duration, default=float("inf"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, lines = load_table(), read()
    kept = Kept(
        "search-efficiency",
        content_hash([table.digest, *sorted([one.id, one.seed, *one.decayed] for one in lines)]),
        arguments.time,
    )
    seeds = range(arguments.seeds)

    def curves(name: str, make: Any) -> list[list[Known]]:
        found = [kept.get(f"{name} {seed}", lambda seed=seed: [vars(one) for one in make(seed)]) for seed in seeds]
        return [[Known(**one) for one in curve] for curve in found]

    arms = {"a": curves("a", lambda seed: search(table, seed))}
    box = float(np.mean([curve[-1].operations for curve in arms["a"]]))
    limit = round(FOLLOWED * box)
    arms["b"] = curves("b", lambda seed: random_search(table, seed, limit))
    arms["c"] = curves("c", lambda seed: script(table, seed, limit))
    recipe = table.space.baselines[RECIPE]
    arms["d"] = [tuned(table, lines, recipe, round(box), taught=True)]
    arms["e"] = [tuned(table, lines, without_teacher(recipe), round(box), taught=False)]
    runs = default_cache() / "benchmarks" / "runs"
    checks = []
    for seed in range(arguments.real):
        with prepare(runs, f"efficiency-{table.digest}-{seed}", trials=TRIALS) as prepared:
            checks.append(kept.get(f"real {seed}", lambda seed=seed, one=prepared: real(table, one, seed)))
    with prepare(runs, f"table-{RUNGS[-1]}") as prepared:
        judge = Judge(prepared)
        by_id = {line.id: Strategy.from_json(line.strategy) for line in lines}

        def tested(one: Known) -> dict[str, Any]:
            key = f"test split {one.strategy} {one.seed} {one.deployment} {TEST_QUESTIONS}"
            return kept.get(key, lambda: judge.judge(by_id[one.strategy], one.seed, one.deployment))

        chosen = {name: [at(curve, box) or curve[0] for curve in found] for name, found in arms.items()}
        untuned = arms["d"][0][0]
        test = {name: [tested(one) for one in found] for name, found in chosen.items()}
        test["d, untuned"] = [tested(untuned)]
        test["teacher"] = [kept.get("test split teacher", lambda: teacher_on_test(prepared, judge))]
    path = report.write(
        "search-efficiency",
        "What a search finds for its compute",
        sections(table, arms, box, chosen, test, checks, lines),
    )
    print(path)


def teacher_on_test(prepared: Prepared, judge: Judge) -> dict[str, Any]:
    """The unmodified teacher, in 16 bits."""
    from autodistill.distillation.teacher import load_model

    model = load_model(prepared.setting.teacher, torch.float32)
    packing = judge._deployments["huggingface"]
    spec, budget = prepared.setting.teacher_spec, prepared.setting.budget
    found, scores = evaluate(model, spec, packing, judge._data, None, budget=budget, evaluators=(METRIC, "exact_match"))
    tokens = per_document(scores.correct, scores.documents)
    figures = {name: found.measurements[name].value for name in (METRIC, "exact_match")}
    answers = found.documents["others"]["exact_match"]
    return {
        **figures,
        "count": tokens["count"],
        "tokens": tokens["sum"],
        "answers": answers["sum"],
        "asked": answers["count"],
    }


NAMES = {
    "a": "(a) this search",
    "b": "(b) random search, to the end",
    "c": "(c) an afternoon's script",
    "d": "(d) the recipe, tuned",
    "e": "(e) fine-tuning, tuned",
    "d, untuned": "the recipe as it stands",
    "teacher": "the teacher, 16 bits (does not fit)",
}


def sections(
    table: Table,
    arms: dict[str, list[list[Known]]],
    box: float,
    chosen: dict[str, list[Known]],
    test: dict[str, list[dict[str, Any]]],
    checks: list[dict[str, int]],
    lines: list[Line],
) -> list[str]:
    """The report's parts."""
    recipe = table.space.baselines[RECIPE]
    whole = Worker(table, plan(1, (RUNGS[-1],), ())).costs.stretch(recipe, 0, -1)
    untuned, target = arms["d"][0][0].value, max(one.value for one in arms["d"][0])
    near = table.best() - NEAR
    limit = FOLLOWED * box
    curve_rows, pass_rows = [], []
    for name, found in arms.items():
        cells = [NAMES[name]]
        for share in SHARES:
            values = [best.value for curve in found if (best := at(curve, share * box)) is not None]
            follows = name in ("b", "c") or share <= 1
            cells.append(mean(values, 100, 2) if follows and len(values) == len(found) else "")
        curve_rows.append(cells)
        if name in ("a", "b", "c"):
            cells = [NAMES[name]]
            for value in (untuned, target, near):
                at_most = [first_above(curve, value) for curve in found]
                share = np.mean(np.isfinite(at_most))
                middle = float(np.median(at_most))
                cells += [
                    f"{share:.0%}",
                    f"{middle / whole:.1f}" if np.isfinite(middle) else f"more than {limit / whole:.0f}",
                ]
            pass_rows.append(cells)
    ratios = [speedup(arms, value, limit) for value in (untuned, target, near)]
    test_rows = []
    for name, found in test.items():
        gain = "" if name == "d" else difference(found, test["d"][0], "tokens", "count")
        answers = "" if name == "d" else difference(found, test["d"][0], "answers", "asked")
        values = [100 * np.mean([one[key] for one in found]) for key in (METRIC, "exact_match")]
        distinct = len({(one.strategy, one.seed, one.deployment) for one in chosen.get(name, [])}) or 1
        test_rows.append([NAMES[name], distinct, f"{values[0]:.2f}", gain, f"{values[1]:.2f}", answers])
    times = training(table, chosen, lines)
    checked = "; ".join(
        f"of {one['stretches']} stretches of seed {seed} {one['same']} had the recorded value to the last bit"
        + (f" and {one['others']} were others" if one["others"] else "")
        for seed, one in enumerate(checks)
    )
    shown = f" {checked[:1].upper()}{checked[1:]}." if checks else ""
    answers = answer_gain(test)
    verdicts = [
        f"(a) passes the recipe as it stands at one fifth of the compute of (c): {ratios[0]}",
        f"(a) passes the tuned recipe at one fifth of the compute of (c): {ratios[1]}",
        f"The same for the best of the table less {100 * NEAR:g} points, which is no target: {ratios[2]}",
        f"At the end of the box at least 1.8 points above (d) on test: "
        f"{'held' if answers[0] >= 1.8 else 'not held'}, {answers[0]:+.2f} ± {answers[1]:.2f} points of exact match "
        "(mean over the searches, paired and bootstrapped by document).",
        f"With a student trained in 40% less time than (d)'s: {times[1]}",
    ]
    head = (
        f"The math teacher, `math_space.yaml` with {len(table.recorded)} strategies that fit the budget and as many "
        f"that do not, {RUNGS[-1]:,} tokens a trial, plans of {TRIALS} trials; {len(arms['a'])} seeds of (a), (b) "
        "and (c), one of the students but for (d) and (e), which choose among several. Values are accuracies of an "
        "answer's next token on validation. Compute is operations: 6 for each weight and token trained, 2 for each "
        f"read, of teacher, cache and evaluations too. The box is what (a) spends on the mean, {box:.3g} "
        f"operations: {box / whole:.1f} times the recipe's training.{shown}"
    )
    cut = (
        "Cut to fit: students are looked up in one recorded table instead of trained for each arm and seed; the "
        "searches' seeds so share one seed of the students, and errors are over proposals alone. Not repeated on the "
        "135M teacher. The narrow shape keeps a sixth of the FFN neurons because in a pilot one with two thirds of "
        "them answered as well before training as after it, so that nothing was to be searched."
    )
    curve_titles = ["best accuracy after", *(f"{share:g} boxes" for share in SHARES)]
    pass_titles = ["", "pass the recipe", "at", "pass the tuned recipe", "at", "come near the best", "at"]
    test_titles = [
        "chosen in the box",
        "students",
        "next token, %",
        "less (d), points",
        "exact match, %",
        "less (d), points",
    ]
    return [
        head,
        "## Targets\n\n" + "\n".join(f"- {line}" for line in verdicts),
        "## Best validation accuracy by compute, in percent\n\n" + report.table(curve_titles, curve_rows),
        f"## Compute to come as far\n\nThe recipe as it stands has {100 * untuned:.2f}%, tuned {100 * target:.2f}%; "
        f"the best of the table {100 * table.best():.2f}%, and near it is {100 * NEAR:g} points less. Share of the "
        f"seeds that ever pass it ((a) within its box, the others within {FOLLOWED}), and the median compute at "
        "which "
        "they do, in trainings of the recipe.\n\n" + report.table(pass_titles, pass_rows),
        f"## Test\n\n{TEST_QUESTIONS} questions that no arm saw. Differences are paired and bootstrapped by "
        "document.\n\n" + report.table(test_titles, test_rows),
        "## Training a student\n\n" + times[0],
        "## Limits\n\n" + cut,
    ]


def speedup(arms: dict[str, list[list[Known]]], value: float, limit: float) -> str:
    """How many times the compute of (a) the script takes to pass a value, by the medians over seeds."""
    mine, theirs = (float(np.median([first_above(curve, value) for curve in arms[name]])) for name in ("a", "c"))
    if not np.isfinite(mine):
        return "not held: the median search does not pass it in its box."
    if not np.isfinite(theirs):
        factor = limit / mine
        return f"{'held' if factor >= 5 else 'not shown'}: at least {factor:.1f} times, where the script was given up."
    return f"{'held' if theirs / mine >= 5 else 'not held'}: {theirs / mine:.1f} times, by the medians."


def difference(found: list[dict[str, Any]], other: dict[str, Any], what: str, count: str) -> str:
    """Mean difference in points and its standard error over questions, paired."""
    value, error = gap(found, other, what, count)
    return f"{value:+.2f} ± {error:.2f}"


def gap(found: list[dict[str, Any]], other: dict[str, Any], what: str, count: str) -> tuple[float, float]:
    """The same as numbers."""
    mine = np.mean([one[what] for one in found], axis=0)
    counts = np.asarray(other[count], float)
    values, errors = paired_bootstrap((mine - np.asarray(other[what]))[None], counts)
    return 100 * float(values[0]), 100 * float(errors[0])


def answer_gain(test: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """Of (a) over (d), in points of exact match."""
    return gap(test["a"], test["d"][0], "answers", "asked")


def training(table: Table, chosen: dict[str, list[Known]], lines: list[Line]) -> tuple[str, str]:
    """What training the chosen students took, and whether that is 40% less than the recipe's."""
    by = {(line.id, line.seed): line for line in lines}
    costs = Worker(table, plan(1, (RUNGS[-1],), ())).costs
    rows, seconds, operations = [], {}, {}
    for name in ("a", "d", "e"):
        found = [by[one.strategy, one.seed] for one in chosen[name]]
        seconds[name] = float(np.mean([line.train_seconds for line in found])) * RUNGS[-1]
        operations[name] = float(np.mean([costs.train(Strategy.from_json(line.strategy), RUNGS[-1]) for line in found]))
        rows.append([NAMES[name], f"{seconds[name]:.1f}", f"{operations[name]:.3g}"])
    less = 1 - seconds["a"] / seconds["d"]
    text = "Seconds of one thread at the rate of the stable part, the same tokens for all.\n\n"
    saved = 1 - operations["a"] / operations["d"]
    verdict = f"{'held' if less >= 0.4 else 'not held'}, {less:+.0%} less time ({saved:+.0%} less operations)."
    return text + report.table(["", "seconds", "operations"], rows), verdict


if __name__ == "__main__":
    main()
