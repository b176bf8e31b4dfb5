"""What a served student is held to, written into its record and read back: limits asked for, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from autodistill.errors import InputError
from autodistill.hardware.budget import NO_LIMIT, Budget, DeviceBudget, LatencyLimit, read_budget
from autodistill.hardware.catalog import listed
from autodistill.hardware.device import ONE_CHIP, Device
from autodistill.runs.results.row import Row
from autodistill.utils.typed_data import check_typed

RECORD = "export.json"
"""The record beside an export, which holds its promise."""


class ExportRecord(TypedDict):
    """What is read of `export.json`."""

    version: int
    format: str
    row: str | None
    deployment: Mapping[str, Any]
    artifact: str
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    proof: Mapping[str, Any] | None


def check_exported(folder: Path) -> None:
    """Refuse what is no export, and name the exports that lie in it, as in a run or in what `export --out` wrote.

    Raises:
        InputError: No such folder, or one without a record.
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


_MAKERS = ("nvidia", "amd")  # of GPUs that a container is given
_LIMITED_PROMPT = 512  # tokens of prompts whose first token a limit is of


def promise_of(row: Row, budget: Budget, deployment: str | None = None) -> dict[str, Any] | None:
    """Return what a row promises as plain data.

    Args:
        row: With its figures.
        budget: That of its run.
        deployment: Name of the deployment that is exported; None where it is the row's own. Of another one nothing was
            measured here, and nothing is promised.

    Returns:
        "context" and "streams" that it holds for; "memory_bytes" and "latency", which were asked for (None, and an
        empty list, where they were not); and under "measured" what the runtime did, with the machine: "memory_bytes",
        "tpot_p95_ms", "ttft_p50_ms" and the length of its "prompt". None where nothing is promised.
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


def promise_asked(row: Row, asked: Mapping[str, Any], deployment: str | None = None) -> dict[str, Any] | None:
    """Return the promise of a row of a stored run, from what its `search.json` says of the budget."""
    budget = asked.get("budget")
    return promise_of(row, read_budget(budget), deployment) if budget else None


class _Latency(TypedDict):
    quantity: str
    percentile: int
    seconds: float
    streams: int
    prompt: NotRequired[int | None]


class _Stored(TypedDict):
    """A promise as `promise_of` writes it into a record."""

    context: int
    streams: int
    memory_bytes: int | None
    device: NotRequired[str | None]
    latency: tuple[_Latency, ...]
    measured: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Promised:
    """What an exported student promises; None where nothing was asked, or is known.

    Attributes:
        context: Tokens of each sequence.
        streams: Sequences at once.
        memory_bytes: Limit of the memory: of the process, or of the GPU where the device is a discrete one.
        latency: Limits of the time to the first token and of the time per later token.
        prompt: Tokens of the prompts whose first token is limited; None where none is, or nothing says how many.
        device: Name of what it is for.
        measured: What was found in its runtime: "memory_bytes", "tpot_p95_ms", "ttft_p50_ms", "machine" and others.
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
        """Read what `promise_of` wrote, which may come from anywhere.

        Args:
            stored: Plain data.
            where: It stands, for the message.

        Raises:
            InputError: It is something else.
        """
        check_typed(stored, _Stored, f"the promise in {where}")
        limits = []
        for one in stored["latency"]:
            whole = one["quantity"] in ("ttft", "tpot") and 1 <= one["percentile"] <= 99 and one["seconds"] > 0
            if not whole:
                raise InputError(f"the promise in {where} has a latency that is none: {dict(one)}")
            limits.append(LatencyLimit(**{field.name: one[field.name] for field in fields(LatencyLimit)}))
        context, streams, memory = stored["context"], stored["streams"], stored["memory_bytes"]
        if context < 1 or streams < 1 or (memory is not None and memory < 1):
            raise InputError(f"the promise in {where} is of nothing: {dict(stored)}")
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
        """Return a measured figure that is a number above 0, or None."""
        value = self.measured.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None

    @property
    def known_device(self) -> Device | None:
        """The device, where the catalogue has it."""
        return next((one for one in listed() if one.name == self.device), None)

    @property
    def on_gpu(self) -> bool:
        """Whether the memory is that of a discrete GPU."""
        known = self.known_device
        return known.discrete if known else self._named_gpu

    @property
    def gpu_maker(self) -> str:
        """The maker of the device's GPU, "nvidia" or "amd"; "" where it has none that a container is given."""
        known = self.known_device
        maker = next((one for one in _MAKERS if (self.device or "").lower().startswith(one)), "")
        if known is None:
            return maker if self._named_gpu else ""
        # NVIDIA's boards have one that containers are given too.
        return maker if known.discrete or (maker == "nvidia" and known.kind.name in ONE_CHIP) else ""

    @property
    def _named_gpu(self) -> bool:
        """Whether a device that no catalogue has is a GPU by its name, as its driver gives it."""
        name = (self.device or "").lower()
        return name.startswith(("nvidia", "amd instinct", "amd radeon"))
