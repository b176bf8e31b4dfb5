"""Answers that need no search: the memory and speed of a model on some hardware, and the best stored student for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autodistill.objects.html import facts
from autodistill.objects.student import Student
from autodistill.runs.run_folder import RunFolder
from autodistill.units import format_bytes


class Estimate:
    """The predicted memory and speed of a model.

    Attributes:
        document: The whole answer, as `autodistill estimate --json` prints it.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    @property
    def memory_bytes(self) -> int:
        """Memory of inference on the named device: weights, KV cache, compute buffers and overhead."""
        alone = self.document["devices"] if len(self.document["devices"]) == 1 else ()
        return int(alone[0]["total_bytes"] if alone else self.document["total_bytes"])

    @property
    def fits(self) -> bool | None:
        """Whether the named device can hold and serve the model. None if no device, or several, were named."""
        devices = self.document["devices"]
        return bool(devices[0]["fits"]) if len(devices) == 1 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed on the named device, or None if it is not known."""
        value = self.document["tokens_per_second"]
        return None if value is None else float(value)

    @property
    def time_to_first_token_ms(self) -> float | None:
        """Milliseconds to the first token on the named device, or None if it is not known."""
        value = self.document["time_to_first_token_ms"]
        return None if value is None else float(value)

    def __repr__(self) -> str:
        return f"<Estimate of {self.document['model']} as {self.document['deployment']}: {self._memory()}>"

    def _memory(self) -> str:
        return f"{format_bytes(self.memory_bytes)} at context {self.document['context']}"

    def _repr_html_(self) -> str:
        lines = {"deployment": self.document["deployment"], "memory": self._memory(), "fits": self.fits}
        lines |= {"tokens per second": self.tokens_per_second, "first token (ms)": self.time_to_first_token_ms}
        return facts(str(self.document["model"]), lines)


class Pick:
    """The best stored student for some hardware.

    Attributes:
        document: The whole answer, as `autodistill pick --json` prints it.
    """

    def __init__(self, document: dict[str, Any], out: Path) -> None:
        self.document, self._out = document, out

    @property
    def student(self) -> Student | None:
        """The picked student. None for a pick by tiers, whose `document` has a student for each tier."""
        picked = self.document.get("pick")
        if picked is None:
            return None
        run = RunFolder.open(self._out, picked["run"])
        return Student(next(row for row in run.events.rows() if row.row_id == picked["row_id"]), run)

    def __repr__(self) -> str:
        return f"<Pick {self.student!r}>"

    def _repr_html_(self) -> str:
        return facts("Pick", self.document) if self.student is None else self.student._repr_html_()
