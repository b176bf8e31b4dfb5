"""A model that a run has evaluated: how it was made and packed, its metrics, and its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodistill.objects.html import facts
from autodistill.runs.results.differences import paired, paired_difference
from autodistill.runs.results.row import Row, finite
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import best_of
from autodistill.units import format_bytes

_FIGURES = (
    *("accuracy", "perplexity", "agreement", "retention", "memory_bytes", "size_bytes", "params"),
    *("latency_ms", "tokens_per_second", "train_tokens", "train_seconds", "fidelity"),
)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure of a student.

    Attributes:
        value: The figure.
        stderr: Its standard error, or None if it is not known.
        source: "measured" in the runtime, or "predicted". None if the run does not say.
    """

    value: float
    stderr: float | None = None
    source: str | None = None

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        told = f"{self.value:,.0f}" if float(self.value).is_integer() else f"{self.value:.4g}"
        told += "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return told if self.source is None else f"{told} ({self.source})"


class Student:
    """A model that a run has evaluated in one deployment. The quantised teacher is one too.

    Attributes:
        id: Id of its row on the leaderboard.
        name: Name for people.
        kind: "student", "baseline", "confirmation", "teacher", or "initial", which is a student without training.
        feasible: Whether it keeps to the budget. If not, `reason` says why.
        strategy: How it was made. None for the teacher.
        deployment: How its weights are packed, and what serves them.
        metrics: Figures on the validation split, by name, with their standard errors.
    """

    def __init__(self, row: Row, run: RunFolder) -> None:
        self._row, self._run = row, run
        self.id, self.name, self.kind = row.row_id, row.name, row.kind
        self.feasible, self.reason = row.feasible, row.reason
        self.strategy = row.strategy
        self.deployment = row.deployment
        self.metrics: Mapping[str, Metric] = _metrics(row)

    @property
    def path(self) -> Path | None:
        """The file or folder for its runtime, if its run exported this student. Else None, and `export` writes it."""
        if not self.feasible:
            return None
        best = best_of(self._run, self._run.events.rows(split="validation"))
        folder = self._run.student(self.deployment.container)
        if best is None or best.row_id != self.id or not folder.is_dir():
            return None
        return next(folder.glob("*.gguf"), folder)

    def export(
        self,
        to: str,
        out: str | Path,
        *,
        teacher: str | Path | None = None,
        notify: Callable[[str], None] = lambda line: None,
    ) -> Path:
        """Write this student in a container, and verify that what was written is what was evaluated.

        Args:
            to: The format: "gguf", "huggingface", "compressed-tensors", "onnx", "onnx-f16", "pt2", "torchscript",
                "aoti", "litert", "litert-codes", "litertlm", "executorch", or the name of an exporter that you
                installed.
            out: Folder to write into. The container gets a folder in it.
            teacher: Where the run's teacher is now, if it was moved.
            notify: Called with lines about progress, and about what the user must know of the student.

        Returns:
            The file or folder for a runtime.

        Raises:
            InputError: There is no such container, the student is no longer on disk, or the folder is neither empty nor
                an unchanged export of this student.
            VerificationError: The written files differ from what was evaluated.
        """
        from autodistill.search.finish.export_run import export_run

        return export_run(self._run, self.id, [to], Path(out), notify, teacher=teacher)[to]

    def difference(self, other: Student, metric: str = "accuracy") -> Metric | None:
        """Return how much higher a metric is than another student's, paired by document. None if they share none.

        Args:
            other: A student of the same run and split.
            metric: The metric's name.
        """
        found = paired_difference(paired(self._row, metric), paired(other._row, metric))
        return None if found is None else Metric(value=found[0], stderr=found[1])

    def to_dict(self) -> dict[str, Any]:
        """Return its row of the leaderboard as plain data."""
        return self._row.to_json()

    def __repr__(self) -> str:
        accuracy = self.metrics.get("accuracy")
        told = "" if accuracy is None else f", accuracy {accuracy}"
        return f"<Student {self.id} of {self._run.name}: {self.name} as {self.deployment.name}{told}>"

    def _repr_html_(self) -> str:
        lines: dict[str, object] = {"run": self._run.name, "kind": self.kind, "deployment": self.deployment.name}
        lines |= {name: _shown(name, metric) for name, metric in self.metrics.items()}
        kept = None if self.feasible else f"does not keep to the budget: {self.reason}"
        return facts(f"{self.name} ({self.id})", lines | {"budget": kept, "path": self.path})


def _metrics(row: Row) -> dict[str, Metric]:
    """Return the figures of a row, including those of further evaluators."""
    names = [*_FIGURES, *(name for name in row.other if not name.endswith("_stderr"))]
    sources = {"memory_bytes": row.memory_source, "latency_ms": row.latency_source}
    return {
        name: Metric(value=value, stderr=finite(row.figure(f"{name}_stderr")), source=sources.get(name))
        for name in names
        if (value := finite(row.figure(name))) is not None
    }


def _shown(name: str, metric: Metric) -> str:
    return format_bytes(metric.value) if name.endswith("_bytes") else str(metric)
