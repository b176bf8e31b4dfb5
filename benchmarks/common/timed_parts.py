"""Time the parts of a search on the math task that the recorded table has no times for.

    python -m benchmarks.common.timed_parts [--repeats 5]

The table's lines have the seconds of training with cached teacher outputs and of evaluating students. This program
times the rest of what a search or a script does: making the cache, running the teacher in every training step, and
scoring the teacher. Each is timed together with a part that the table has, both with the hand-designed recipe on one
thread. Both times are kept in `reports/math-parts.json`. A replay of the table uses the ratio of the two, so the speed
of the machine does not matter.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autodistill.distillation.student.check import student_spec
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import evaluate
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.loading import load_model
from autodistill.options import cache_folder
from autodistill.search.worker.begin import initial_student
from autodistill.search.worker.context import Workbench
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from benchmarks.common import program, report
from benchmarks.common.math_search import RECIPE, STEP, TOKENS, prepare
from benchmarks.common.math_teacher import make_small
from benchmarks.common.prepared import Prepared, new_trainer

STORE = "math-parts.json"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds of one thread's CPU time, all measured on one machine.

    Attributes:
        machine: A description of the machine.
        step, live_step: One optimiser step of the recipe with cached outputs, and with the teacher run in the step.
        cache: Making the teacher's outputs for a trial's tokens. The teacher is loaded for it.
        evaluation: One evaluation of the recipe's student over the tokens that are read at the end.
        teacher_rows: The teacher's score and its row under each deployment, over the same tokens.
    """

    machine: str
    step: float
    live_step: float
    cache: float
    evaluation: float
    teacher_rows: float

    @property
    def live_over_training(self) -> float:
        """The time that running the teacher adds to the recipe student's training, as a share of that training."""
        return self.live_step / self.step - 1

    @property
    def cache_over_training(self) -> float:
        """The time of making the cache, divided by the time of training the recipe's student on the same tokens."""
        return self.cache / (self.step * TOKENS / STEP)

    @property
    def rows_over_evaluation(self) -> float:
        """The time of the teacher's score and rows, divided by that of one evaluation of the recipe's student."""
        return self.teacher_rows / self.evaluation


def read() -> Parts:
    """Return the timed parts.

    Raises:
        SystemExit: No parts were timed.
    """
    path = program.TRACKED / STORE
    if not path.exists():
        raise SystemExit(f"{path.name} is missing: run `python -m benchmarks.common.timed_parts` first")
    return Parts(**json.loads(path.read_text()))


def step_seconds(prepared: Prepared, strategy: Strategy, steps: int = 12) -> float:
    """Return the CPU seconds of a thread for one optimiser step, after some steps to warm up."""
    _, trainer = new_trainer(Workbench(prepared.setting), strategy, 0)
    times = []
    for record in trainer.train_stable(3 * steps * STEP):
        times.append(time.process_time())
        del record
    return statistics.median(after - before for before, after in zip(times[steps:], times[steps + 1 :], strict=False))


def live(strategy: Strategy) -> Strategy:
    """Return the same strategy with a teacher that runs in every training step."""
    return replace(strategy, distillation=replace(strategy.distillation, signal="online", signal_tokens=0))


def cache_seconds(prepared: Prepared) -> float:
    """Return the CPU seconds of writing the teacher's cache."""
    bench, spec = Workbench(prepared.setting), prepared.setting.teacher_spec
    assert bench.cache is not None
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        ensure_cache(
            lambda: load_model(prepared.setting.teacher, torch.float32),
            teacher_fingerprint="timed",
            data_fingerprint="timed",
            data=bench.train,
            vocabulary=spec.vocabulary,
            width=spec.width,
            settings=bench.cache.settings,
            root=Path(folder),
            limit_bytes=4 * 10**9,
        )
        return time.process_time() - started


def evaluation_seconds(prepared: Prepared, model: Any, spec: Any, deployment: Deployment) -> float:
    """Return the CPU seconds of evaluating a model under a deployment on the tokens that are read at the end."""
    setting = prepared.setting
    data, top1 = Workbench(setting).held_out(setting.plan.eval_tokens)
    started = time.process_time()
    evaluate(
        model, Subject(spec=spec, deployment=deployment, budget=setting.budget), data, top1, evaluators=("accuracy",)
    )
    return time.process_time() - started


def measure(prepared: Prepared, recipe: Strategy, repeats: int, steps: int) -> Parts:
    """Return the medians over repeats. In each repeat, every part is timed once."""
    setting, deployments = prepared.setting, prepared.question.deployments
    teacher = load_model(setting.teacher, torch.float32)
    student, _ = initial_student(setting, recipe.init, 0)
    spec = student_spec(recipe, setting.teacher_spec)

    def rows() -> float:
        # The teacher's score is one more evaluation, without packing.
        each = [evaluation_seconds(prepared, teacher, setting.teacher_spec, one) for one in deployments]
        return sum(each) + each[-1]

    parts: dict[str, Callable[[], float]] = {
        "step": lambda: step_seconds(prepared, recipe, steps),
        "live_step": lambda: step_seconds(prepared, live(recipe), steps),
        "cache": lambda: cache_seconds(prepared),
        "evaluation": lambda: evaluation_seconds(prepared, student, spec, deployments[0]),
        "teacher_rows": rows,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats):
        for name, part in parts.items():
            times[name].append(part())
        print(f"turn {turn + 1} of {repeats}: {', '.join(f'{name} {all_[-1]:.3f}' for name, all_ in times.items())}")
    return Parts(machine=report.machine(), **{name: statistics.median(found) for name, found in times.items()})


def main() -> None:
    """Time each part of a search on the math task, and write the medians for the replay."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each part, of which the median counts")
    parser.add_argument("--steps", type=int, default=12, help="before those that are timed, which are twice as many")
    arguments = program.parse(parser, repeats=1, steps=2)
    torch.set_num_threads(1)
    keep_freed_memory()
    if arguments.smoke:
        make_small()
    with prepare(cache_folder() / "benchmarks" / "runs", f"table-{TOKENS}") as prepared:
        found = measure(prepared, prepared.space.baselines[RECIPE], arguments.repeats, arguments.steps)
    (program.REPORTS / STORE).write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
