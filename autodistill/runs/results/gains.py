"""The gains of an exported row over the best untrained row and over the baseline, as values and as one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autodistill.evaluation.base import Direction
from autodistill.runs.results.differences import paired, paired_difference
from autodistill.runs.results.row import Row, named_now
from autodistill.units import with_error


def named(row: Row) -> str:
    """Return a row's name and deployment in words."""
    what = "the teacher itself" if row.kind == "teacher" else row.name
    if row.deployment.file is None:
        return f"{what} as {row.deployment_name}"
    what = "the teacher's own file" if row.kind == "teacher" else f"the file {row.name.partition(', ')[0]}"
    cache = row.deployment_name.partition("+")[2]
    return f"{what} with {cache}" if cache else what


def _stored(gain: Mapping[str, Any]) -> Gain:
    return Gain(**{**gain, "named": named_now(gain["named"])})


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The gain of one row over another one on the test split.

    Attributes:
        over: Id of the other row.
        named: The other row in words.
        value, stderr: Gain and its standard error, paired by document. It is above 0 if the other row is worse. Both
            are None if the rows cannot be paired, and the error is None for a single document.
    """

    over: str
    named: str
    value: float | None
    stderr: float | None

    @classmethod
    def of(cls, row: Row, other: Row, metric: str, direction: Direction) -> Gain:
        """Compute the gain of one row over another one, on the same examples."""
        found = paired_difference(paired(row, metric), paired(other, metric))
        value, stderr = found or (None, None)
        signed = -value if value is not None and direction == "min" else value
        return cls(over=other.row_id, named=named(other), value=signed, stderr=stderr)

    def shown(self, unit: str = "") -> str:
        """Return the gain with its error and, if `unit` is given, with its unit."""
        if self.value is None:
            return "unknown, since it is not recorded for each document"
        return with_error(self.value, self.stderr, "+.4f") + (f" of {unit}" if unit else "")


@dataclass(frozen=True, kw_only=True)
class Gains:
    """The gains of the exported row over the best untrained row and over the baseline, on the test split.

    Attributes:
        exported: Id of the exported row.
        named: The exported row in words.
        trained: Whether the exported row was trained.
        untrained: Gain over the best row that needs no training and fits the budget. None if there is no such row, or
            if it is the exported one.
        baseline: Gain over the baseline that was trained on the same number of tokens. None if there is no baseline, or
            if it is the exported row.
        unit: The metric of the gains, and its unit if it has one.
        forgot: Whether a trained student was better by the metric, but was not chosen since it forgot general text.
    """

    exported: str
    named: str
    trained: bool
    untrained: Gain | None
    baseline: Gain | None
    unit: str
    forgot: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the gains as fields of `search.json`."""
        return {
            "exported": {
                "row_id": self.exported,
                "named": self.named,
                "trained": self.trained,
                **({"forgot": True} if self.forgot else {}),
            },
            "gain_over_untrained": self.untrained and asdict(self.untrained),
            "gain_over_baseline": self.baseline and asdict(self.baseline),
            "gain_unit": self.unit,
        }

    @classmethod
    def from_json(cls, search: Mapping[str, Any]) -> Gains | None:
        """Read the gains from `search.json`, or return None if it has none yet."""
        if "exported" not in search:
            return None
        over = (search[name] and _stored(search[name]) for name in ("gain_over_untrained", "gain_over_baseline"))
        exported, unit = search["exported"], search["gain_unit"]
        untrained, baseline = over
        return cls(
            exported=exported["row_id"],
            named=named_now(exported["named"]),
            trained=exported["trained"],
            untrained=untrained,
            baseline=baseline,
            unit=unit,
            forgot=exported.get("forgot", False),
        )

    def describe(self) -> str:
        """Return the gains in one line."""
        if self.forgot:
            said = f"What was trained forgot general text, and {self.named} is exported as it is (see --goal)"
        elif not self.trained:
            said = f"No trained student is better than {self.named}, which is exported as it is"
        elif self.untrained is None:
            said = "Nothing that needs no training fits the budget"
        else:
            said = (
                f"Gain on test over the best that needs no training ({self.untrained.named}), paired: "
                f"{self.untrained.shown(self.unit)}"
            )
        if self.baseline is None:
            return f"{said}."
        if self.untrained is not None:
            return f"{said}; over the baseline: {self.baseline.shown()}."
        return f"{said}. Gain on test over the baseline, paired: {self.baseline.shown(self.unit)}."


def unit_of(row: Row, metric: str) -> str:
    """Return the unit of a gain in a metric, in words."""
    unit = (row.documents or {}).get("unit")
    return f"{metric}, in {unit}" if unit else metric
