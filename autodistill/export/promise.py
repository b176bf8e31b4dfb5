"""The promise of a served student, which is written into its record: requested limits, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from autodistill.errors import InputError
from autodistill.hardware.budget import NO_LIMIT, Budget, DeviceBudget, LatencyLimit, read_budget
from autodistill.hardware.catalog import listed
from autodistill.hardware.device import ONE_CHIP, Device
from autodistill.runs.results.row import RUNTIME_LOSS, Row
from autodistill.utils.typed_data import check_typed

RECORD = "export.json"
"""The record next to an export; it holds the export's promise."""


class ExportRecord(TypedDict):
    """The fields of `export.json` that are read."""

    version: int
    format: str
    row: str | None
    deployment: Mapping[str, Any]
    artifact: str
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    proof: Mapping[str, Any] | None


def check_exported(folder: Path) -> None:
    """Refuse a folder that is no export; the message names exports inside it, for example in a run's folder.

    Raises:
        InputError: There is no such folder, or it has no record.
    """
    if (folder / RECORD).is_file():
        return
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}: name one that a search or autodistill export wrote, like "
            "results/runs/RUN/student/gguf"
        )
    inner = sorted(path.parent for pattern in ("*", "student/*") for path in folder.glob(f"{pattern}/{RECORD}"))
    named = (
        f"one of the exports in it, {', '.join(map(str, inner))}" if inner else "a folder that autodistill export wrote"
    )
    raise InputError(f"{folder} has no {RECORD}: name {named}")


_MAKERS = ("nvidia", "amd")  # makers of GPUs that a container can be given
_LIMITED_PROMPT = 512  # length of the prompts for which a limit on the first token holds


def promise_of(row: Row, budget: Budget, deployment: str | None = None) -> dict[str, Any] | None:
    """Return what a row promises, as plain data.

    Args:
        row: A row with its figures.
        budget: Budget of the row's run.
        deployment: Name of the exported deployment; None if it is the row's own. Another deployment was not measured,
            so nothing is promised for it.

    Returns:
        None if nothing is promised. Otherwise, "context" and "streams" for which the promise holds. "memory_bytes" and
        "latency" are the requested limits (None and an empty list without limits). "measured" has the runtime's figures
        and the machine: "memory_bytes", "tpot_p95_ms", "ttft_p50_ms" and the length of its "prompt".
    """
    if deployment is not None and deployment != row.deployment.name:
        return None
    measured: dict[str, Any] = {}
    if row.memory_source == "measured" and row.memory_bytes:
        measured["memory_bytes"] = row.memory_bytes
        if row.other.get("memory_on"):
            measured["memory_on"] = row.other["memory_on"]
    if row.latency_source == "measured" and row.latency_ms:
        detail: Mapping[str, Any] = row.other.get("latency_detail") or {}
        alone: Mapping[str, Any] = next(iter(detail.get("loads", ())), {})
        measured |= {"machine": row.machine, "tpot_p95_ms": row.latency_ms, "ttft_p50_ms": row.figure("ttft_ms")}
        measured |= {"prompt": alone.get("prompt_tokens")}
    for name in (RUNTIME_LOSS, "runtime_accuracy"):
        measured |= {name: row.figure(name)} if row.figure(name) is not None else {}
    latency = budget.latency if isinstance(budget, DeviceBudget) else ()
    return {
        "context": row.context or budget.context,
        "streams": row.batch or budget.batch,
        "memory_bytes": budget.memory_bytes if budget.memory_bytes < NO_LIMIT else None,
        "device": budget.device.name if isinstance(budget, DeviceBudget) else None,
        "latency": [
            {
                "quantity": limit.quantity,
                "percentile": limit.percentile,
                "seconds": limit.seconds,
                "streams": limit.streams,
                "prompt": _LIMITED_PROMPT if limit.quantity == "ttft" else None,
            }
            for limit in latency
        ],
        "measured": measured,
    }


def promise_asked(row: Row, settings: Mapping[str, Any], deployment: str | None = None) -> dict[str, Any] | None:
    """Return the promise of a row of a stored run, with the budget in its `search.json`."""
    budget = settings.get("budget")
    return promise_of(row, read_budget(budget), deployment) if budget else None


class _Latency(TypedDict):
    quantity: str
    percentile: int
    seconds: float
    streams: int
    prompt: NotRequired[int | None]


class _Stored(TypedDict):
    """A promise in the form in which `promise_of` writes it into a record."""

    context: int
    streams: int
    memory_bytes: int | None
    device: NotRequired[str | None]
    latency: tuple[_Latency, ...]
    measured: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Promised:
    """The promise of an exported student; fields are None if they were not requested or are not known.

    Attributes:
        context: Tokens of each sequence.
        streams: Sequences at once.
        memory_bytes: Limit of the memory of the process, or of the GPU if the device is a discrete GPU.
        latency: Limits of the time to the first token and of the time per later token.
        prompt: Length of the prompts whose first token is limited; None if there is no such limit, or no length is
            given.
        device: Name of the device that the promise is for.
        measured: Figures measured in its runtime: "memory_bytes", "tpot_p95_ms", "ttft_p50_ms", "machine" and others.
    """

    context: int
    streams: int
    memory_bytes: int | None = None
    latency: tuple[LatencyLimit, ...] = ()
    prompt: int | None = None
    device: str | None = None
    measured: Mapping[str, Any]

    @classmethod
    def read(cls, stored: Any, where: str) -> Promised:
        """Read a promise that `promise_of` wrote; the data may come from anywhere.

        Args:
            stored: Plain data.
            where: Where the data is stored, for the message.

        Raises:
            InputError: The data is not a promise.
        """
        check_typed(stored, _Stored, f"the promise in {where}")
        limits = []
        for one in stored["latency"]:
            whole = one["quantity"] in ("ttft", "tpot") and 1 <= one["percentile"] <= 99 and one["seconds"] > 0
            if not whole:
                raise InputError(f"the promise in {where} has a latency that is not valid: {dict(one)}")
            limits.append(LatencyLimit(**{field.name: one[field.name] for field in fields(LatencyLimit)}))
        context, streams, memory = stored["context"], stored["streams"], stored["memory_bytes"]
        if context < 1 or streams < 1 or (memory is not None and memory < 1):
            raise InputError(f"the promise in {where} promises nothing: {dict(stored)}")
        return cls(
            context=context,
            streams=streams,
            memory_bytes=memory,
            latency=tuple(limits),
            prompt=next((one.get("prompt") for one in stored["latency"] if one["quantity"] == "ttft"), None),
            device=stored.get("device"),
            measured=stored["measured"],
        )

    def figure(self, name: str) -> float | None:
        """Return a measured figure if it is a number above 0, else None."""
        value = self.measured.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None

    @property
    def known_device(self) -> Device | None:
        """The device, if the catalogue has it, else None."""
        return next((one for one in listed() if one.name == self.device), None)

    @property
    def on_gpu(self) -> bool:
        """Whether the promised memory is that of a discrete GPU."""
        known = self.known_device
        return known.discrete if known else self._named_gpu

    @property
    def of_process(self) -> bool:
        """Whether the promised memory is that of a process. A server's process does not show what a GPU holds."""
        return not self.on_gpu and "memory_on" not in self.measured

    @property
    def gpu_share(self) -> float | None:
        """The share of the device's memory that is promised, for vLLM, which takes all that it is given.

        None if nothing is promised of a GPU's memory, or the device is not in the catalogue.
        """
        known = self.known_device
        if self.memory_bytes is None or known is None or not known.discrete:
            return None
        return min(0.95, max(0.01, math.floor(100 * self.memory_bytes / known.memory_bytes) / 100))

    @property
    def gpu_maker(self) -> str:
        """The maker of the device's GPU, "nvidia" or "amd"; "" if it has no GPU that a container can be given."""
        known = self.known_device
        maker = next((one for one in _MAKERS if (self.device or "").lower().startswith(one)), "")
        if known is None:
            return maker if self._named_gpu else ""
        # NVIDIA's boards also have a GPU that containers can be given.
        return maker if known.discrete or (maker == "nvidia" and known.kind.name in ONE_CHIP) else ""

    @property
    def _named_gpu(self) -> bool:
        """Whether a device that is not in the catalogue is a GPU, judged by its driver's name for it."""
        name = (self.device or "").lower()
        return name.startswith(("nvidia", "amd instinct", "amd radeon"))
