"""Runs finalists in the runtime that will serve them: its loss on held-out text ranks them, and is what a row promises.

A search judges its trials in torch, on packed weights. A runtime rounds activations, keys and values in its own way, so
what is kept is packed, compared with the evaluated weights bit for bit, and read by the runtime itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from autodistill.data.dataset import TokenSet, load_split
from autodistill.errors import RuntimeDiffersError
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.export.base import Artifact, Ran, load_exporter
from autodistill.export.model_card import Origin
from autodistill.export.record import forget
from autodistill.export.verify import MOST_EXCESS, Verification, verify
from autodistill.hardware.background_load import free_cores
from autodistill.runs.results.differences import paired, paired_difference
from autodistill.runs.results.finalists import decided_in_runtime
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED
from autodistill.runs.results.row import RUNTIME_LOSS, Row
from autodistill.runs.results.selection import in_order
from autodistill.search.finish.context import Finisher, Packed
from autodistill.strategy.deployment import Deployment
from autodistill.units import with_error
from autodistill.utils.json_files import read_json

TOKENS = 8192
"""Tokens of validation text that a runtime reads of each finalist, if the search evaluates as many."""
_UNTRAINED = 3  # rows without training that are run, besides the files that the user brought


def pack(row: Row, deployment: Deployment, finisher: Finisher) -> tuple[Artifact, Verification]:
    """Write one deployment of a row's model and compare the bytes on disk with the evaluated weights."""
    exporter = load_exporter(deployment.container)
    student, out = finisher.student(row), finisher.run.student(deployment.container)
    label = Origin.of(read_json(finisher.run.search_file)).label(row)
    finisher.packed.pop(deployment.container, None)
    forget(out)
    artifact = exporter.export(student, deployment, out, **label)
    return artifact, verify(exporter, artifact, student, deployment)


def held_out(row: Row, finisher: Finisher) -> TokenSet:
    """Return the validation text that finalists read, as the row's model renders it."""
    rendering = finisher.setting.rendering(row.strategy.init if row.strategy else None)
    data = load_split(finisher.data.folder, "validation", rendering)
    length = data.tokens.shape[1]
    most = min(finisher.question.plan.eval_tokens, math.ceil(TOKENS / (length - 1)) * length)
    return data.head(max(most, length))


def packed_and_run(row: Row, finisher: Finisher) -> Packed:
    """Pack a row's model, verify the bytes, and let its runtime read the held-out text. The last result is kept.

    Raises:
        AutoDistillError: The container cannot hold the model, its weights on disk are not those that were evaluated, or
            the runtime is missing, dies or refuses the file.
    """
    container = row.deployment.container
    known = finisher.packed.get(container)
    if known is not None and known.row == row.row_id:
        return known
    with finisher.phases.phase("export", f"packing {row.name} as {row.deployment_name}"):
        artifact, weights = pack(row, row.deployment, finisher)
    with finisher.phases.phase("evaluate", f"{row.deployment.runtime} reads {row.name} as {row.deployment_name}"):
        sequences = np.array(held_out(row, finisher).tokens)
        threads, student = free_cores(finisher.threads), finisher.student(row)
        ran = load_exporter(container).run(artifact.path, sequences, threads, student, row.deployment)
    found = finisher.packed[container] = Packed(row.row_id, artifact, weights, ran)
    return found


def with_runtime_loss(row: Row, finisher: Finisher) -> Row:
    """Return a row with its loss and accuracy in its runtime, by document; unchanged if the runtime reports no loss.

    Raises:
        RuntimeDiffersError: The runtime loses 0.2 nats a token more than the evaluated weights on the same documents.
        AutoDistillError: As by `packed_and_run`.
    """
    ran, data = packed_and_run(row, finisher).ran, held_out(row, finisher)
    if ran.nll is None:
        return row
    found = with_losses(row, ran, data)
    gap = paired_difference(_shared(found, RUNTIME_LOSS, row), _shared(row, "perplexity", found))
    if gap is None:
        return found
    if not gap[0] <= MOST_EXCESS:
        raise RuntimeDiffersError(
            f"{row.deployment.runtime} loses {with_error(*gap, '+.4f')} nats a token more of {row.name} as "
            f"{row.deployment_name} than its evaluated weights do"
        )
    return replace(found, other={**found.other, "runtime_excess": gap[0], "runtime_excess_stderr": gap[1]})


def with_losses(row: Row, ran: Ran, data: TokenSet) -> Row:
    """Return a row with what its runtime lost on some text, by document."""
    assert ran.nll is not None
    counted = np.ones(data.tokens.shape, dtype=bool) if data.scored is None else data.scored
    counted = counted[:, 1:]
    nll, documents = np.asarray(ran.nll[counted], np.float64), np.asarray(data.documents[:, 1:][counted])
    right = (ran.top1 == data.tokens[:, 1:])[counted].astype(float)
    (loss, stderr), (accuracy, error) = clustered_mean(nll, documents), clustered_mean(right, documents)
    figures = {RUNTIME_LOSS: loss, f"{RUNTIME_LOSS}_stderr": stderr}
    figures |= {"runtime_accuracy": accuracy, "runtime_accuracy_stderr": error, "runtime_tokens": nll.size}
    kept = dict(row.documents or {"ids": [], "count": [], "sum": []})
    others = {**kept.get("others", {}), RUNTIME_LOSS: {**per_document(nll, documents), "unit": "nats"}}
    return replace(row, other={**row.other, **figures}, documents={**kept, "others": others})


def _shared(row: Row, figure: str, other: Row) -> dict[str, list[float]] | None:
    """Return a figure by document, for the documents that the row's loss and perplexity both have whole."""
    mine = paired(row, figure)
    theirs = paired(other, "perplexity" if figure == RUNTIME_LOSS else RUNTIME_LOSS)
    if mine is None or theirs is None:
        return None
    counts = dict(zip(theirs["ids"], theirs["count"], strict=True))
    whole = [place for place, name in enumerate(mine["ids"]) if counts.get(name) == mine["count"][place]]
    return {part: [mine[part][place] for place in whole] for part in ("ids", "count", "sum")} if whole else None


def unread(rows: Sequence[Row], finisher: Finisher, container: str | None = None) -> Iterator[Row]:
    """Yield the finalists that no runtime has read yet, the most promising first: one is trained, the others are not.

    Args:
        rows: The rows to choose among, without those that were refused.
        finisher: What the final steps share.
        container: The container of the row's deployment. None allows any.
    """
    question = finisher.question
    if not decided_in_runtime(question.metric):
        return
    ranked = in_order(rows, question.metric, question.direction, students_only=question.students_only, simulated=True)
    ranked = [row for row in ranked if container in (None, row.deployment.container)]
    trained = [row for row in ranked if row.kind in DISTILLED][:1]
    # Of rows in the same storage, the first has the better rounding.
    untrained = list({row.deployment: row for row in reversed(ranked) if row.kind in UNTRAINED}.values())[::-1]
    brought = [row for row in untrained if row.deployment.file is not None]
    for row in dict.fromkeys((*(one.row_id for one in (*untrained[:_UNTRAINED], *brought, *trained)),)):
        found = next(one for one in ranked if one.row_id == row)
        if found.figure(RUNTIME_LOSS) is None:
            yield found
