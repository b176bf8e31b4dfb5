"""`cascade`: evaluate two rows of a run together, the small one first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from autodistill.api.paths import run_folder
from autodistill.objects.run import Run
from autodistill.options import ONE_RUN, RUNS, Cache, Moved, Option, Runs, cache_folder
from autodistill.runs.standing import find_pair


def cascade(
    run: Annotated[str | Path | Run | None, ONE_RUN] = None,
    rows: Annotated[
        str,
        Option(
            help="The small row, a comma, and the large one: ids as leaderboard shows them, or teacher for the large.",
            metavar="SMALL,LARGE",
            required=True,
        ),
    ] = "",
    measure: Annotated[
        bool, Option(help="Export both for a moment, and measure their speed and memory on this machine.")
    ] = False,
    runs: Runs = RUNS,
    cache: Cache = None,
    teacher: Moved = None,
    *,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate two rows together: the small one answers, and defers to the large one where it is not confident.

    Both are evaluated on the validation split. The test split is not read. The evaluated items and the curve are saved
    in the run's folder, and the run's page shows the curve.

    Returns:
        Plain data: the curve by position; if the data has questions, the curve by answer too; and the paths of the
        files that were written.

    Raises:
        InputError: There is no such run or row, or its models or data are no longer on this disk.
    """
    folder = run_folder(run, Path(runs))
    pair = find_pair(folder, rows)  # before the engines are imported, which takes seconds
    from autodistill.hardware.background_load import free_cores
    from autodistill.hardware.machine import detect
    from autodistill.report.writing import write_page
    from autodistill.search.cascade import cascade as found

    threads = free_cores(detect().cpus) if measure else 1
    document = found(folder, pair, cache_folder(cache), notify, measure=measure, threads=threads, teacher=teacher)
    document["paths"]["page"] = str(write_page(folder))
    return document
