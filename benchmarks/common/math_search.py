"""A search on the math task, prepared as `autodistill search` prepares it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autodistill.hardware.budget import Budget
from autodistill.options import cache_folder
from autodistill.search.request.request import SearchRequest
from autodistill.strategy.space import Space, load_space
from benchmarks.common import math_teacher
from benchmarks.common.math_teacher import LENGTH, MathTeacher
from benchmarks.common.prepared import Prepared, prepared

SPACE_FILE = Path(__file__).with_name("math_space.yaml")
# The memory of three of the teacher's layers at 4 bits. Larger students do not fit; narrow ones fit with more bits.
BUDGET = Budget(memory_bytes=1_007_250_000, context=64, batch=1)
STEP = 16 * LENGTH
TOKENS = 100 * STEP
RUNG_QUESTIONS, QUESTIONS, TEST_QUESTIONS = 200, 400, 500
METRIC = "accuracy"
RECIPE = "hand_designed"


def require_teacher() -> MathTeacher:
    """Return the trained math teacher.

    Raises:
        SystemExit: It is not trained yet.
    """
    teacher = math_teacher.math_teacher(0)
    if teacher is None:
        sys.exit("the math teacher is not trained yet: run `python -m benchmarks.common.math_teacher` first")
    return teacher


@contextmanager
def prepare(
    out: Path, name: str, *, seed: int = 0, trials: int = 1, tokens: int = TOKENS, metric: str = METRIC
) -> Iterator[Prepared]:
    """Load, plan, cache and score as a search does, on one thread. An existing run of this name is continued.

    Args:
        out: Folder of the runs.
        name: The run's name. Its folder is locked within the block.
        seed: Seed of proposals, data order and projections.
        trials: Number of trials in the plan.
        tokens: Training tokens at full fidelity.
        metric: The metric that ranks trials.
    """
    request = SearchRequest(
        budget=BUDGET,
        teacher=str(require_teacher().folder),
        data=math_teacher.TASK,
        space=str(SPACE_FILE),
        metric=metric,
        trials=trials,
        tokens=tokens,
        step_tokens=STEP,
        sequence_length=LENGTH,
        seed=seed,
        name=name,
        runs=out,
        runner="inline",
        cache=cache_folder(),
    )
    # There are enough questions to tell trials apart, and they are the same in everything that is compared.
    read = {"rung_eval_tokens": RUNG_QUESTIONS, "eval_tokens": QUESTIONS, "test_tokens": TEST_QUESTIONS}
    with prepared(request, **{part: questions * LENGTH for part, questions in read.items()}) as ready:
        yield ready


def space() -> Space:
    """Return the space of the math task."""
    return load_space(str(SPACE_FILE))
