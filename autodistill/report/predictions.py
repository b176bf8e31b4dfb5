"""Predictions of a run and their measured values: memory, size, latency, KL of solved constructions, and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autodistill.runs.results.objectives import PREDICTED_LATENCY
from autodistill.units import format_bytes, format_duration

if TYPE_CHECKING:
    from autodistill.report.contents import Contents


_LEAST_KL = 5e-5


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A figure that was predicted, and then measured.

    Attributes:
        what: "memory", "size", "latency", "KL" or "time".
        of: What the figure belongs to, in words.
        predicted, measured: The figures, in bytes, milliseconds, nats a token or seconds.
    """

    what: str
    of: str
    predicted: float
    measured: float

    @property
    def is_nothing(self) -> bool:
        """Whether both are a KL that is shown as 0. Their ratio would be a ratio of rounding errors."""
        return self.what == "KL" and max(self.predicted, self.measured) < _LEAST_KL

    @property
    def ratio(self) -> float:
        """The measured figure divided by the predicted one."""
        return self.measured / self.predicted

    def shown(self, value: float) -> str:
        """Return a value with its unit."""
        if self.what in ("memory", "size"):
            return format_bytes(value)
        if self.what == "KL":
            return f"{value:.4f} nats"
        return format_duration(value / 1e3 if self.what == "latency" else value)


def predictions(contents: Contents) -> list[Prediction]:
    """Return every figure of a run that was both predicted and measured."""
    return [one for one in _all(contents) if one.predicted > 0 and not one.is_nothing]


def _all(contents: Contents) -> Iterator[Prediction]:
    for row in contents.rows:
        for what, name in (("memory", "memory_bytes"), ("size", "size_bytes")):
            predicted, measured = row.figure(f"{name}_predicted"), row.figure(name)
            if predicted is not None and measured is not None:
                yield Prediction(what=what, of=row.row_id, predicted=predicted, measured=measured)
        late = row.figure(PREDICTED_LATENCY)
        if late is not None and row.latency_ms is not None and row.latency_source == "measured":
            yield Prediction(what="latency", of=row.row_id, predicted=late, measured=row.latency_ms)
    whole = {row.deployment.name: row for row in contents.rows if row.kind == "teacher"}
    for one in contents.solved:
        stored = whole.get(one.deployment.name)
        if one.whole and one.kl is not None and stored is not None and (kl := stored.figure("kl")) is not None:
            of = f"{stored.row_id}: on calibration text, and on validation"
            yield Prediction(what="KL", of=of, predicted=one.kl, measured=kl)
    plan: Mapping[str, Any] = contents.settings.get("plan") or {}
    planned: Mapping[str, float] = plan.get("seconds") or {}
    seconds: Mapping[str, float] = contents.settings.get("seconds", {})
    if planned and "total" in seconds:
        yield Prediction(
            what="time", of="the whole run", predicted=sum(planned.values()), measured=float(seconds["total"])
        )
