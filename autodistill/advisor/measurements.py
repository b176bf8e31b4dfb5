"""Measurements of students on machines, stored next to the runs, and the corrections of predictions from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.estimates.speed import speed
from autodistill.hardware.device import Device
from autodistill.hardware.lookup import is_machine
from autodistill.models.config import spec_from_config
from autodistill.strategy.deployment import Deployment
from autodistill.utils.durable import make_folder
from autodistill.utils.event_log import EventLog
from autodistill.utils.typed_data import check_typed

FILE = "measurements.jsonl"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measurement of one student in one runtime on one machine.

    Attributes:
        student: SHA-256 of the GGUF file, or of the folder's weights.
        name: Name for a person.
        shape: A config that describes the student, as `models.config.config_of` returns it.
        deployment: `Deployment` as plain data.
        size_bytes: Bytes of its weights on disk.
        machine: The machine's name for itself, or the device that the user says it is.
        how: What timed it: "autodistill", or llama-bench and its build.
        threads, prompt, context: CPU threads, tokens of the prompt, and tokens of context before a decoding step.
        ttft_ms, tpot_ms, tpot_p95_ms: Median time of the first token; median and 95th percentile of a later token.
            With llama-bench these are over repetitions, since it does not time single steps.
        tokens_per_second, prompt_tokens_per_second: Speeds with one stream.
        peak_bytes: Peak memory of the runtime's process, or None.
        board: Cores, temperature, throttling, power mode, watts and joules per token, as far as they are known.
        loads: Figures for several numbers of streams, as `timing.Streams` returns them.
        doubts: Reasons why the figures are doubtful. Empty if none was seen.
        time: Time of the measurement, in ISO 8601.
    """

    student: str
    name: str
    shape: Mapping[str, Any]
    deployment: Mapping[str, Any]
    size_bytes: int
    machine: str
    how: str
    threads: int
    prompt: int
    context: int
    ttft_ms: float
    tpot_ms: float
    tpot_p95_ms: float
    tokens_per_second: float
    prompt_tokens_per_second: float
    peak_bytes: int | None = None
    board: Mapping[str, Any] = field(default_factory=dict)
    loads: Sequence[Mapping[str, Any]] = ()
    doubts: Sequence[str] = ()
    time: str = ""

    @property
    def runtime(self) -> str:
        """The runtime that served the student."""
        return str(self.deployment["runtime"])

    @property
    def apart(self) -> int:
        """Difference between its threads and the machine's cores, if both are known."""
        return abs(int(self.board.get("cores", self.threads)) - self.threads)

    def is_of(self, device: Device) -> bool:
        """Return whether it was made on that device."""
        facts = {name: self.board.get(name) for name in ("memory_bytes", "cores")}
        return is_machine(device, self.machine, **facts)

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain data."""
        return asdict(self) | {"loads": [dict(load) for load in self.loads], "doubts": list(self.doubts)}


def store_measured(out: Path, measured: Measured) -> Path:
    """Append a measurement to the file next to the runs, and return the file's path."""
    path = out / FILE
    make_folder(path.parent)
    EventLog(path).append({"event": "measured", **measured.to_json()})
    return path


def read_measured(out: Path) -> list[Measured]:
    """Return the stored measurements, the last one for each student, machine, runtime and number of threads.

    A doubtful measurement is only returned if all of its group are doubtful.

    Raises:
        InputError: A measurement is incomplete.
    """
    path = out / FILE
    if not path.is_file():
        return []
    latest: dict[tuple[str, str, str, int], Measured] = {}
    for event in EventLog(path).read():
        fields = {name: event[name] for name in Measured.__dataclass_fields__ if name in event}
        try:
            check_typed(fields, Measured, "it")
            Deployment.from_json(fields["deployment"])
            spec_from_config(fields["shape"])
        except InputError as error:
            raise InputError(f"{path} has a measurement that is not whole ({error}): remove its line") from None
        found = Measured(**fields)
        key = (found.student, found.machine, found.runtime, found.threads)
        if not found.doubts or key not in latest or latest[key].doubts:
            latest[key] = found
    return list(latest.values())


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The ratio of measured to predicted times, on one device in one runtime.

    Attributes:
        decode, prefill: Median ratios, or 1 if nothing was measured.
        count: Number of measurements that they rest on.
        doubtful: Whether all of these are doubtful, for example because the board throttled.
    """

    decode: float = 1.0
    prefill: float = 1.0
    count: int = 0
    doubtful: bool = False


def correction(measured: Iterable[Measured], device: Device, runtime: str) -> Correction:
    """Return the factors by which to scale predictions for a device, from the measurements on it.

    Predictions assume all cores, so only the measurements with the nearest number of threads count. Doubtful ones are
    left out unless there are no others.
    """
    own = [one for one in measured if one.runtime == runtime and one.is_of(device)]
    whole = [one for one in own if one.apart == min(other.apart for other in own)]
    used = [one for one in whole if not one.doubts] or whole
    decodes, firsts = [], []
    for one in used:
        spec, deployment = spec_from_config(one.shape), Deployment.from_json(one.deployment)
        step = speed(spec, deployment, device, context=max(1, one.context), weights=one.size_bytes)
        read = speed(spec, deployment, device, context=one.prompt, prompt=one.prompt, weights=one.size_bytes)
        decodes.append(one.tpot_ms / step.decode_ms)
        firsts.append(one.ttft_ms / read.time_to_first_token_ms)
    return Correction(
        decode=statistics.median(decodes) if decodes else 1.0,
        prefill=statistics.median(firsts) if firsts else 1.0,
        count=len(used),
        doubtful=bool(used) and all(one.doubts for one in used),
    )
