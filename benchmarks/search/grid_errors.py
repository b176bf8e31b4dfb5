"""Do the weights of each teacher of the benchmarks lie on a grid of 4 or 8 bits?

    python -m benchmarks.search.grid_errors [--teachers smollm2 reordered arithmetic small]

A teacher that was rounded before is packed without loss, and nothing can be said with it about bits. Errors are those
of `off_grid_teacher`: of 32 rows of each tensor, relative to a uniform error in a step, beside those of normal weights.
The reordered teacher is SmolLM2 with its channels in another order, which computes the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.options import cache_folder
from autodistill.utils.json_files import read_json
from benchmarks.common import math_teacher, report
from benchmarks.common.program import parse, parser_of, tiny_teacher
from benchmarks.common.reordered import reordered
from benchmarks.search.off_grid_teacher import NORMAL, errors, off_grid
from benchmarks.search.small_teacher import small_teacher

TEACHERS = ("smollm2", "reordered", "arithmetic", "small")


def folder_of(name: str, given: argparse.Namespace) -> Path:
    """Return the folder of a teacher by its name here.

    Raises:
        SystemExit: It is not trained yet, or the name is unknown.
    """
    reference = tiny_teacher() if given.smoke else "smollm2"
    if name in ("smollm2", "reordered"):
        packaged = materialize(resolve_teacher(reference), cache_folder()).folder
        return packaged if name == "smollm2" else reordered(packaged)
    if name == "small":
        return small_teacher()
    folder = math_teacher.teacher_folder()
    if name != "arithmetic" or not folder.exists():
        sys.exit(f"there is no teacher {name!r}: train it first, or name others of {', '.join(TEACHERS)}")
    return folder


def main() -> None:
    """Measure the errors of each teacher, and write the report."""
    parser = parser_of(__doc__)
    parser.add_argument("--teachers", nargs="+", default=TEACHERS[:3], help="those that exist here")
    given = parse(parser, teachers=TEACHERS[:2])
    rows = []
    for name in given.teachers:
        folder = folder_of(name, given)
        model = load_model(folder, torch.float32)
        found = errors(model, spec_from_config(read_json(folder / "config.json")))
        report.note(name, {"errors": found, "off_grid": off_grid(found)})
        for kind, (error, normal) in found.items():
            rows.append([name, kind, f"{error:.4f}", f"{normal:.4f}", "off" if error >= NORMAL * normal else "on"])
    text = (
        "Squared error of packing over that of a uniform error in a step, under the scales that fit best. From "
        f"{NORMAL:g} of the error of normal weights on, weights count as off the grid."
    )
    table = report.table(["teacher", "grid", "its weights", "normal weights", "on or off"], rows)
    print(report.write("grid-errors", "Which teachers lie on a grid", [text, table]))


if __name__ == "__main__":
    main()
