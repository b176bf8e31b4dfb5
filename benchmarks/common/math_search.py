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
# What three of the teacher's layers need at 4 bits: larger students do not fit, narrow ones do with more bits.
BUDGET = Budget(memory_bytes=1_007_250_000, context=64, batch=1)
STEP = 16 * LENGTH
TOKENS = 100 * STEP
RUNG_QUESTIONS, QUESTIONS, TEST_QUESTIONS = 200, 400, 500
METRIC = "accuracy"
RECIPE = "hand_designed"


def require_teacher() -> MathTeacher:
    """The trained math teacher.

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
    """Loads, plans, caches and scores as a search does, on one thread; a run that is there is gone on with.

    Args:
        out: Folder of the runs.
        name: Of the run; its folder is locked within the block.
        seed: Of proposals, data order and projections.
        trials: Of the plan.
        tokens: Training tokens at full fidelity.
        metric: That ranks.
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
    # Enough questions that trials can be told apart, the same for all that is compared.
    read = {"rung_eval_tokens": RUNG_QUESTIONS, "eval_tokens": QUESTIONS, "test_tokens": TEST_QUESTIONS}
    with prepared(request, **{part: questions * LENGTH for part, questions in read.items()}) as ready:
        yield ready


def space() -> Space:
    """Return the space of the math task."""
    return load_space(str(SPACE_FILE))
