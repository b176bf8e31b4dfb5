"""Record students of the math space at every rung, as a table on which samplers and schedulers can be replayed.

    python -m benchmarks.common.math_table [--time 20m]

Each line of `reports/math-table.jsonl` is one strategy and seed. It has the accuracy on validation before distillation,
at each rung after a decay branched off, at each rung without that decay, and at full fidelity under every deployment
that the budget allows. Strategies that differ only in their finishing share the stable part of training, as in a
search. The order is: the space at two learning rates on one seed; then the recipe, and the same without a teacher, on
further seeds; then the other rates. Existing lines are not made again. Trained students are kept in the cache of
AutoDistill, for the test split. A replay of the table uses the learning rates for which every strategy is recorded.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from autodistill.distillation.student.check import probe_deployment, student_spec
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.trainer import Trainer
from autodistill.estimates.fit import fits, holdable
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.options import cache_folder
from autodistill.search.worker.begin import initial_student
from autodistill.search.worker.context import Workbench
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Point
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Finishing, Strategy
from benchmarks.common import math_teacher, program, report
from benchmarks.common.math_search import RECIPE, STEP, TOKENS, prepare, space
from benchmarks.common.prepared import Prepared, accuracy, new_trainer

STORE = "math-table.jsonl"
# Shares of the tokens after which every strategy is judged: the search's own rungs, and an earlier one.
RUNGS = tuple(round(TOKENS / STEP * share) * STEP for share in (1 / 27, 1 / 9, 1 / 3, 1))
RATES = (2e-3, 1e-3, 4e-3, 5e-4)
FURTHER_SEEDS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One strategy with one seed.

    Attributes:
        strategy: The strategy as plain data.
        seed: Seed of data order and projections.
        tokens: Tokens at each rung, ascending.
        initial: Accuracy before distillation, under the probe.
        decayed, plain: Accuracy at each rung, under the probe: after the decay, and without it. The last rung has no
            value without the decay.
        rows: Accuracy at full fidelity, by deployment.
        probe: Name of the deployment under which rungs are judged.
        train_seconds, evaluate_seconds: Seconds of one trained token, and of one evaluation at a rung. They are CPU
            time of one thread, which a busy machine does not lengthen.
    """

    strategy: Mapping[str, Any]
    seed: int
    tokens: tuple[int, ...]
    initial: float
    decayed: tuple[float, ...]
    plain: tuple[float, ...]
    rows: Mapping[str, float]
    probe: str
    train_seconds: float
    evaluate_seconds: float

    @cached_property
    def id(self) -> str:
        """The strategy's id."""
        return Strategy.from_json(self.strategy).id

    @property
    def final(self) -> float:
        """Accuracy under the probe at full fidelity."""
        return self.decayed[-1]


def read(path: Path = program.TRACKED / STORE) -> list[Line]:
    """Return the recorded lines that have all rungs."""
    lines = [Line(**line) for line in report.lines_of(path)]
    return [
        replace(line, **{name: tuple(getattr(line, name)) for name in ("tokens", "decayed", "plain")})
        for line in lines
        if tuple(line.tokens) == RUNGS
    ]


def student_file(strategy: Strategy, seed: int) -> Path:
    """Return the file of a student at the end of its training."""
    return cache_folder() / "math-table" / f"{strategy.id}-{seed}-{TOKENS}.safetensors"


def fitting(prepared: Prepared, strategy: Strategy) -> tuple[Deployment, ...]:
    """Return the deployments of a strategy's student that fit the budget."""
    spec = student_spec(strategy, prepared.setting.teacher_spec)
    deployments = holdable(spec, prepared.question.deployments)
    return tuple(fit.deployment for fit in fits(spec, deployments, prepared.question.budget) if fit.slack <= 0)


def wanted(whole: Space, prepared: Prepared) -> Iterator[tuple[list[Strategy], int]]:
    """Yield what to record, in order: strategies that share one stable part, and their seed."""
    points: list[Point] = list(whole.points(lambda dimension: dimension.domain.grid or ()))

    def at(rate: float) -> Iterator[tuple[list[Strategy], int]]:
        groups: dict[str, list[Strategy]] = {}
        for point in points:
            strategy = whole.strategy(point)
            if strategy.distillation.learning_rate == rate and fitting(prepared, strategy):
                groups.setdefault(strategy.stable_id, []).append(strategy)
        yield from ((group, 0) for group in groups.values())

    for rate in RATES[:2]:
        yield from at(rate)
    recipe = whole.baselines[RECIPE]
    for seed in FURTHER_SEEDS:
        for one in (recipe, without_teacher(recipe)):
            yield [replace(one, distillation=replace(one.distillation, learning_rate=RATES[0]))], seed
    for rate in RATES[2:]:
        yield from at(rate)


def without_teacher(recipe: Strategy) -> Strategy:
    """Return fine-tuning: the recipe's student trained on the true tokens alone and finished on the same grid."""
    constant = type(recipe.distillation.temperature)()
    plain = replace(recipe.distillation, divergence_weight=0.0, temperature=constant)
    return replace(recipe, distillation=plain)


class Recorder:
    """Trains strategies and judges them.

    Args:
        prepared: The search whose teacher, data and cache are used.
    """

    rungs = RUNGS

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        setting = prepared.setting
        # The plan's last rung is the same; the table only has more rungs.
        self._bench = Workbench(setting)
        self._plan = setting.plan

    def student(self, strategy: Strategy, seed: int) -> Any:
        """Return the student trained to the end. It is trained again if its weights are not on this machine."""
        path = student_file(strategy, seed)
        if not path.exists():
            self.record([strategy], seed)
        model, _ = initial_student(self._prepared.setting, strategy.init, seed)
        model.load_state_dict(load_file(path), strict=False)
        return model

    def record(self, strategies: list[Strategy], seed: int) -> list[Line]:
        """Train strategies that share everything except their ends, and return a line for each."""
        began, first = time.process_time(), strategies[0]
        plan = self._plan
        model, trainer = new_trainer(self._bench, first, seed)
        probes = {strategy.id: probe_deployment(strategy, fitting(self._prepared, strategy)) for strategy in strategies}
        initial = {
            name: accuracy(self._bench, first, model, probe, plan.rung_eval_tokens) for name, probe in probes.items()
        }
        decayed: dict[str, list[float]] = {name: [] for name in probes}
        plain: dict[str, list[float]] = {name: [] for name in probes}
        rows: dict[str, dict[str, float]] = {}
        trained, evaluated, evaluations = 0.0, 0.0, 0
        with tempfile.TemporaryDirectory() as folder:
            stable = Path(folder) / "stable.safetensors"
            for rung in self.rungs:
                last = rung == self.rungs[-1]
                started = time.process_time()
                exhaust(trainer.train_stable(branch_point(rung, plan.decay, plan.batch_tokens)))
                trained += time.process_time() - started
                trainer.save(stable)
                for strategy in strategies:
                    trainer.load(stable)
                    exhaust(decay(trainer, strategy, rung, self._prepared))
                    started = time.process_time()
                    read_tokens = plan.eval_tokens if last else plan.rung_eval_tokens
                    value = accuracy(self._bench, strategy, model, probes[strategy.id], read_tokens)
                    evaluated, evaluations = evaluated + time.process_time() - started, evaluations + 1
                    decayed[strategy.id].append(value)
                    if last:
                        others = fitting(self._prepared, strategy)
                        rows[strategy.id] = {
                            one.name: accuracy(self._bench, strategy, model, one, plan.eval_tokens)
                            for one in others
                            if one != probes[strategy.id]
                        } | {probes[strategy.id].name: value}
                        path = student_file(strategy, seed)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        save_file({name: one.detach() for name, one in model.named_parameters()}, path)
                if not last:
                    trainer.load(stable)
                    exhaust(trainer.train_stable(rung))
                    for strategy in strategies:
                        probe = probes[strategy.id]
                        plain[strategy.id].append(accuracy(self._bench, strategy, model, probe, plan.rung_eval_tokens))
        stable_tokens = branch_point(self.rungs[-1], plan.decay, plan.batch_tokens)
        print(f"{time.process_time() - began:.1f} s", file=sys.stderr, end=", ")
        return [
            Line(
                strategy=strategy.to_json(),
                seed=seed,
                tokens=self.rungs,
                initial=initial[strategy.id],
                decayed=tuple(decayed[strategy.id]),
                plain=tuple(plain[strategy.id]),
                rows=rows[strategy.id],
                probe=probes[strategy.id].name,
                train_seconds=trained / stable_tokens,
                evaluate_seconds=evaluated / evaluations,
            )
            for strategy in strategies
        ]


def decay(trainer: Trainer, strategy: Strategy, until: int, prepared: Prepared) -> Iterator[Any]:
    """Train the end of a segment, on the finishing grid if there is one."""
    finishing: Finishing | None = strategy.finishing
    if finishing is None:
        return trainer.train_decay(until)
    tensors = student_spec(strategy, prepared.setting.teacher_spec).tensors
    return trainer.train_decay(until, finishing.grids_of(tensors).get)


def exhaust(records: Iterable[Any]) -> None:
    """Consume an iterable and keep nothing."""
    for _ in records:
        pass


def make_small() -> None:
    """Train the small teacher, and set rungs of few steps, in this process."""
    math_teacher.make_small()
    Recorder.rungs = (STEP, 2 * STEP, 3 * STEP, 5 * STEP)


def main() -> None:
    """Train and record the students that the table lacks, and print each when it is done."""
    parser = program.parser_of(__doc__, time=True)
    parser.add_argument("--groups", type=int, help="of students that share a part of their training; all by default")
    arguments = program.parse(parser, groups=1)
    if arguments.smoke:
        make_small()
    store = program.REPORTS / STORE
    torch.set_num_threads(1)
    keep_freed_memory()
    deadline = time.monotonic() + arguments.time
    done = {(line.id, line.seed) for line in read(store)}
    # The name is always the same, so that a later call continues with what is prepared before the first trial.
    with prepare(cache_folder() / "benchmarks" / "runs", f"table-{TOKENS}") as prepared:
        recorder = Recorder(prepared)
        everything = list(wanted(space(), prepared))[: arguments.groups]
        count = sum(len(group) for group, _ in everything)
        for group, seed in everything:
            missing = [strategy for strategy in group if (strategy.id, seed) not in done]
            if not missing:
                continue
            if time.monotonic() > deadline:
                sys.exit(f"the time is over with {len(done)} of {count} recorded: call again for the rest")
            for line in recorder.record(missing, seed):
                report.add_line(store, {name: getattr(line, name) for name in line.__dataclass_fields__})
                done.add((line.id, seed))
                print(f"{len(done)} of {count}: {line.final:.4f} {line.rows}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
