"""The promise of an export, as limits of single figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.export.promise import RECORD, Promised, promise_asked
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import best_of
from autodistill.service.request import MARGIN
from autodistill.service.served import find_row, find_run, find_served
from autodistill.units import format_bytes, format_duration
from autodistill.utils.json_files import read_json

# A first token may take this much longer: only the runtime was timed, and a client's request also has to reach it.
_REQUEST_OVERHEAD_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The largest value that one figure may have.

    Attributes:
        quantity: "ttft" (time to the first token), "tpot" (time of each later token), or "memory".
        percentile: Percentile of the times; None for memory.
        most: The limit, in seconds or bytes.
        streams: Number of sequences at once for which the limit holds.
        prompt: Tokens of the prompt to which a limit of the first token applies; None if that does not matter or is
            unknown.
        requested: Whether a search was asked for the limit. Otherwise it is the measured value plus a margin.
    """

    quantity: str
    percentile: int | None
    most: float
    streams: int
    prompt: int | None = None
    requested: bool = True

    @property
    def figure(self) -> str:
        """The name of the figure, like "ttft_p95" or "memory"."""
        return self.quantity if self.percentile is None else f"{self.quantity}_p{self.percentile}"

    def shown(self, value: float) -> str:
        """Return a value of the figure in words."""
        return format_bytes(value) if self.quantity == "memory" else format_duration(value)


@dataclass(frozen=True, kw_only=True)
class Promise:
    """The limits that a server must keep.

    Attributes:
        of: Name of the export or row that makes the promise, for the user.
        context: Tokens of each sequence at which the memory limit holds, with `streams` sequences.
        limits: At least one limit.
    """

    of: str
    context: int
    streams: int
    limits: tuple[Limit, ...]

    @property
    def prompt(self) -> int | None:
        """Tokens of the prompts to which a limit of the first token applies, or None if unknown."""
        return next((limit.prompt for limit in self.limits if limit.quantity == "ttft" and limit.prompt), None)


def asked_promise(reference: str | None, out: Path, margin: float | None) -> Promise | None:
    """Return the promise that a server must keep, or None if none was named.

    Args:
        reference, out: As for `find_promise`.
        margin: As for `find_promise`; None for the default.

    Raises:
        InputError: As for `find_promise`, or a margin is given without a promise.
    """
    if reference is None:
        if margin is not None:
            raise InputError("--margin applies to a promise: name one with --promise, or leave --margin out")
        return None
    return find_promise(reference, out, MARGIN if margin is None else margin)


def find_promise(reference: str | Path, out: Path, margin: float = MARGIN) -> Promise:
    """Return the promise of an exported folder or file, of what a run exported, or of a row.

    Args:
        reference: As for `find_served`.
        out: Folder that holds the runs.
        margin: Share by which figures without an asked limit may exceed the measured value.

    Raises:
        InputError: Nothing is found, or what is found promises nothing.
    """
    if not 0 <= margin < 100:
        raise InputError(f"--margin must be a share of 0 or more, like 0.25, not {margin}")
    path = Path(reference).expanduser()
    run = find_run(path, str(reference), out)
    if run is not None:
        row = best_of(run, run.events.rows(split="validation"))
        if row is None:
            raise InputError(f"the run {run.name!r} has nothing that keeps to its budget, so it promises nothing")
        return _of_row(run, row, margin)
    if not path.exists():
        found = find_row(str(reference), out)
        return _of_row(found.run, found.row, margin)
    folder = find_served(path, out).export
    if not (folder / RECORD).is_file():
        raise InputError(
            f"{folder} has no {RECORD}, so it promises nothing: name a folder that a search or export wrote"
        )
    record = read_json(folder / RECORD)
    if record.get("promise") is None:
        raise InputError(f"{folder / RECORD} has no promise: export it again, or name its run or row")
    return read_promise(record["promise"], str(record.get("row") or folder), margin, str(folder / RECORD))


def _of_row(run: RunFolder, row: Row, margin: float) -> Promise:
    stored = promise_asked(row, run.read_settings())
    where = f"the row {row.row_id} of the run {run.name!r}"
    if stored is None:
        raise InputError(f"{where} promises nothing: its run has no budget")
    return read_promise(stored, row.row_id, margin, where)


def read_promise(stored: Mapping[str, Any], of: str, margin: float, where: str) -> Promise:
    """Return the limits of a promise that `promise_of` wrote.

    A figure that was asked for has its asked limit. Another figure's limit is the measured value plus a margin.

    Args:
        stored: The promise from a record, which may come from any source.
        of: Name of the export or row that makes the promise.
        margin: See `find_promise`.
        where: The record's place, for messages.

    Raises:
        InputError: The promise has another form, or it limits nothing.
    """
    promised = Promised.read(stored, where)
    limits = [
        Limit(
            quantity=one.quantity,
            percentile=one.percentile,
            most=one.seconds,
            streams=one.streams,
            prompt=promised.prompt if one.quantity == "ttft" else None,
        )
        for one in promised.latency
    ]
    known = {limit.quantity for limit in limits}
    above = 1 + margin
    for quantity, name, percentile in (("ttft", "ttft_p50_ms", 50), ("tpot", "tpot_p95_ms", 95)):
        if quantity not in known and (value := promised.figure(name)):
            # Only the runtime was timed, with one stream.
            prompt = promised.measured.get("prompt") if quantity == "ttft" else None
            limits.append(
                Limit(
                    quantity=quantity,
                    percentile=percentile,
                    most=value / 1e3 * above + (_REQUEST_OVERHEAD_SECONDS if quantity == "ttft" else 0.0),
                    streams=1,
                    prompt=prompt if isinstance(prompt, int) else None,
                    requested=False,
                )
            )
    memory, asked = promised.memory_bytes, promised.memory_bytes is not None
    if memory is None and (value := promised.figure("memory_bytes")):
        memory = int(value * above)
    if memory and promised.of_process:
        limits.append(
            Limit(quantity="memory", percentile=None, most=float(memory), streams=promised.streams, requested=asked)
        )
    if not limits:
        raise InputError(f"{where} promises nothing: no limit was asked for, and nothing was measured")
    return Promise(of=of, context=promised.context, streams=promised.streams, limits=tuple(limits))
