"""Helpers to test solving for one runtime: its options, a limit between two storages, and a solution within it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.search.solve import SolveRequest, solve
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.testing import tiny_text
from autodistill.utils.json_files import read_json

CONTEXT, LENGTH = 256, 64


def options_for(runtime: str, folder: Path, limit: int = 10**12) -> Options:
    """Return the options of a teacher that the runtime serves."""
    spec = spec_from_config(read_json(folder / "config.json"))
    return Options(spec=spec, budget=Budget(memory_bytes=limit, context=CONTEXT), runtime=runtime)


def limit_between(teacher: Path, eight: Deployment) -> int:
    """Return a number of bytes between the smallest storage of its runtime and one of 8 bits."""
    options = options_for(eight.runtime, teacher)
    return (options.smallest()[1].total_bytes + options.memory(eight).total_bytes) // 2


def solved_for(runtime: str, teacher: Path, limit: int, made: Path, **more: Any) -> dict[str, Any]:
    """Return the document of `solve` within a limit, on a small text.

    `made` is a folder for the text, cache and `out`.
    """
    return solve(
        SolveRequest(
            budgets=(Budget(memory_bytes=limit, context=CONTEXT),),
            cache=made / "cache",
            teacher=str(teacher),
            data=str(tiny_text(made / "text", documents=48)),
            tokens=512,
            sequence_length=LENGTH,
            runtime=runtime,
            **more,
        )
    )
