"""Solutions: the best way to store a model within a budget, without training, and the rivals it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodistill.objects.html import table
from autodistill.objects.student import Metric
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes

if TYPE_CHECKING:
    import altair

_COLUMNS = ("storage", "", "memory", "fits", "KL", "NLL", "accuracy", "KL above the solution")


class Rival:
    """A rival of a solution: the teacher's own codes, a plain format, a mixture of llama.cpp, or a file.

    Attributes:
        what: Which of these it is, in words.
        name: Name of its deployment, or of its file.
        deployment: How it is stored and served. None for a file with types that AutoDistill does not write.
        path: The file that was named as a candidate, else None.
        memory_bytes: Predicted memory of its process.
        fits: Whether that memory is within the budget.
        predicted_kl: Sum of its scores, in nats per token. None for a file.
        kl, nll: KL to the teacher and negative log-likelihood, in nats per token of the held-out text. None if not
            measured, because the rival does not fit or is worse by the scores.
        accuracy: Share of the held-out tokens that the model ranks first. None if not measured.
        kl_above_solution: How much its KL is above the solution's, paired by document. None if not measured.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.what: str = document["what"]
        self.fits = bool(document["fits"])
        self.name: str = document["name"]
        self.deployment = document["deployment"] and Deployment.from_json(document["deployment"])
        self.path = Path(document["path"]) if "path" in document else None
        self.memory_bytes = int(document["bytes"])
        self.predicted_kl: float | None = document["predicted_kl"]
        self.kl, self.nll, self.accuracy = (_metric(document, name) for name in ("kl", "nll", "accuracy"))
        self.kl_above_solution = _metric(document, "kl_above_solution")

    def __repr__(self) -> str:
        kept = "" if self.fits else ", which does not fit"
        return f"<Rival {self.name}: {format_bytes(self.memory_bytes)}{kept}>"


class Solution:
    """The best way to store a model within one budget: the one with the least KL to the teacher.

    Attributes:
        budget_bytes: The memory limit.
        deployment: Types of all matrices, the tables and the cache, and the runtime that serves them.
        memory_bytes: Predicted memory of its process.
        predicted_kl: Sum of its scores, in nats per token.
        kl, nll: KL to the teacher and negative log-likelihood, in nats per token of the held-out text.
        accuracy: Share of the held-out tokens that the model ranks first.
        rivals: What a person would use instead, the teacher's own codes first.
        as_good: Name of the first rival that fits and is as good within the error, or None if there is none.
        plain: Which plain storage the solution itself is, in the words of `Rival.what`. None if types were solved.
        binds: Names of the limits that exclude a better solution: "memory", "file size", or those of latency. Empty if
            nothing better is predicted.
        room: What is left of each limit, by name, in bytes or seconds.
        winner: File of the candidate that fits and has the least KL on the calibration text. None if the solution has
            the least.
        document: The whole answer as plain data.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        found = document["solution"]
        self.document = document
        self.budget_bytes = int(document["budget"]["memory_bytes"])
        self.deployment = Deployment.from_json(found["deployment"])
        self.memory_bytes, self.predicted_kl = int(found["bytes"]), float(found["predicted_kl"])
        self.kl, self.nll, self.accuracy = (_measured(found, name) for name in ("kl", "nll", "accuracy"))
        self.rivals = tuple(map(Rival, document["rivals"]))
        self.as_good: str | None = document["as_good"]
        self.plain: str | None = document["plain"]
        self.binds = tuple(str(one["name"]) for one in document["limits"] if one["binds"])
        self.room: dict[str, float] = {one["name"]: one["left"] for one in document["limits"]}
        self.winner = document["winner"] and Path(document["winner"]["path"])

    @property
    def name(self) -> str:
        """Name of the solution's deployment."""
        return self.deployment.name

    def __repr__(self) -> str:
        return f"<Solution {self.name}: {format_bytes(self.memory_bytes)}, KL {self.kl}>"

    def _repr_html_(self) -> str:
        rows = [_row("solved", self, True, None)]
        rows += [_row(one.what, one, one.fits, one.kl_above_solution) for one in self.rivals]
        budget = self.document["budget"]
        load = f"context {budget['context']}, batch {budget['batch']}"
        return table(f"Storage within {format_bytes(self.budget_bytes)} at {load}", _COLUMNS, rows)


class Solutions:
    """The solutions for one budget or several.

    Attributes:
        document: The whole answer, as `autodistill solve --json` prints it.
        solutions: One for each budget that something fits, in the order of the budgets.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.solutions = tuple(map(Solution, document["solutions"]))

    @property
    def best(self) -> Solution:
        """The solution for the largest budget."""
        return max(self.solutions, key=lambda one: one.budget_bytes)

    @property
    def path(self) -> Path | None:
        """The file that was written and verified, or None if no export was asked for."""
        exported = self.document["exported"]
        return None if exported is None else Path(exported["path"])

    def plot(self) -> altair.LayerChart:
        """Draw the KL to the teacher against memory, with plain storages. A notebook shows it, and `save` writes it.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: Nothing was solved.
        """
        from autodistill.report.solved import curve

        return curve(self.document)

    def __repr__(self) -> str:
        return f"<Solutions of {self.document['teacher']['name']}: {', '.join(map(repr, self.solutions))}>"

    def _repr_html_(self) -> str:
        if len(self.solutions) == 1:
            return self.best._repr_html_()
        rows = [
            (format_bytes(one.budget_bytes), one.deployment.name, format_bytes(one.memory_bytes), one.kl, one.nll)
            for one in self.solutions
        ]
        title = f"Storage of {self.document['teacher']['name']}"
        return table(title, ("budget", "storage", "memory", "KL", "NLL"), rows)


def _row(what: str, one: Solution | Rival, fits: bool, above: Metric | None) -> tuple[object, ...]:
    told = ("-" if figure is None else figure for figure in (one.kl, one.nll, one.accuracy, above))
    return (one.name, what, format_bytes(one.memory_bytes), "yes" if fits else "no", *told)


def _metric(found: Mapping[str, Any], name: str) -> Metric | None:
    return None if found[name] is None else _measured(found, name)


def _measured(found: Mapping[str, Any], name: str) -> Metric:
    return Metric(value=float(found[name]), stderr=found[f"{name}_stderr"])
