"""Export of the best row so far: written before any training, and proven when a search is stopped."""

from __future__ import annotations

import torch

from autodistill.errors import AutoDistillError
from autodistill.runs.results.gains import named
from autodistill.runs.results.selection import untrained_in_order
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.export_row import export_packed
from autodistill.search.finish.finish import choice_of, clear_others, describe, export_best
from autodistill.search.finish.forgetting import Gate
from autodistill.units import format_bytes


def write_first(finisher: Finisher) -> str:
    """Write the best row before any training, with its bytes compared but not run, so that something is on disk.

    The end of the search runs it beside what was trained. It is not written if a file is there already.

    Args:
        finisher: What the final steps share.

    Returns:
        A clause for a person: what was written and where, or why nothing was.
    """
    question, run = finisher.question, finisher.run
    rows = run.events.rows(split="validation")
    for row in untrained_in_order(rows, question.metric, question.direction):
        if (folder := run.student(row.deployment.container)).exists():
            return f"{folder} is there already"
        try:
            exported = export_packed(row, row.deployment, finisher)
            describe([exported], (), finisher)
        except AutoDistillError as error:
            finisher.line(f"{named(row)} could not be written ({error})")
            continue
        return f"{named(row)} is written, and not run yet: {exported.path}"
    return "nothing that needs no training fits"


def export_so_far(finisher: Finisher) -> str:
    """Export the best row so far, trained or not, in the same way as at the end of a search.

    It is packed, read back, run in its runtime and measured there. A student is first compared with its own beginning.
    The test split is not read, so that a resumed search does not open it twice.

    Args:
        finisher: What the final steps share.

    Returns:
        A clause for a person: what is exported and where, or why nothing is.
    """
    torch.set_num_threads(finisher.threads)
    choice = choice_of(finisher.run.events.rows(split="validation"), finisher)
    try:
        exported, *_ = export_best(choice, finisher, Gate(finisher))
    except AutoDistillError as error:
        return f"the best so far could not be exported ({error})"
    if exported is None:
        return "nothing so far may be exported"
    clear_others({exported.deployment.container}, finisher)
    describe([exported], (), finisher)
    row, metric = exported.row, finisher.question.metric
    known = row.figure(metric)
    figure = "" if known is None else f" ({metric} {known:.4f} on validation, {format_bytes(row.memory_bytes or 0)})"
    return f"the best so far, {named(row)}{figure}, is exported and verified: {exported.path}"
