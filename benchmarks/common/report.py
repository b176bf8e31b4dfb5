"""A dated Markdown report with the record of its measurements next to it, and results that are computed only once."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.hardware.machine import detect
from autodistill.options import cache_folder
from autodistill.units import format_bytes
from benchmarks.common import program

# The instructions of a CPU that decide how fast it multiplies, the fastest first.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def machine() -> str:
    """Return this machine in one line: processor, cores, memory."""
    found = detect()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in lines}
        flags = facts.get("flags", "").split()
        model = ", ".join([facts.get("model name", model), *[one for one in _INSTRUCTIONS if one in flags][:1]])
    gpus = ", ".join(gpu.name for gpu in found.gpus) or "no GPU"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "ray"))
    cores = "1 core" if found.cpus == 1 else f"{found.cpus} cores"
    return f"{cores} ({model}), {format_bytes(found.memory_bytes)}, {gpus}; {versions}"


def table(titles: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


# What was measured, by name, and the dates and machines of the measurements. `write` stores both next to the report.
_NOTED: dict[str, list[Any]] = {}
_MADE: list[dict[str, str]] = []
# What a report says below its header if the header's date and machine are not those of the measurements.
UNSTAMPED = "The lines of the record have no date or machine: those above are of this rendering."


def stamp() -> dict[str, str]:
    """Return the date and machine of a measurement. A report may be rendered later, and elsewhere, from its record."""
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine()}


def note(name: str, value: Any, made: Mapping[str, str] | None = None) -> None:
    """Keep a measurement for the record that `write` stores next to the report.

    Args:
        name: Name of the measurement. Several values of one name are kept as a list.
        value: Plain data, dataclasses or arrays.
        made: The measurement's `stamp`, if it was not made just now.
    """
    _NOTED.setdefault(name, []).append(plain(value))
    _MADE.append(dict(made or stamp()))


def write(name: str, title: str, sections: Iterable[str], store: Path | None = None, made_by: str = "") -> Path:
    """Write `reports/<date>-<name>.md` and the noted measurements next to it; return the report's path.

    The date and machines in the header are those of the measurements, or of now if a store's lines have none. The
    report says which.

    Args:
        name: The program's name, with hyphens.
        title: The report's title.
        sections: Texts and tables of the report.
        store: The file in `reports/` in which the program itself keeps its measurements, one line of JSON each, with
            the stamp as "made". With a store, nothing has to be noted.
        made_by: The arguments of Python that run the program, if they are more than the name of its module.

    Raises:
        ValueError: Nothing was noted and there is no store. A figure without a record cannot be checked.
    """
    if store is None and not _NOTED:
        raise ValueError(f"{name} noted nothing that its report is made of")
    stamps = _MADE if store is None else [*stamps_of(store)]
    made = max(stamps, key=lambda one: one["date"], default=stamp())
    machines = list(dict.fromkeys(one["machine"] for one in stamps)) or [made["machine"]]
    folder = program.REPORTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{made['date']}-{name}.md"
    kept = f"{path.stem}.json" if store is None else store.name
    if store is None:
        data = {"made": made, "machines": machines, "record": _NOTED}
        (folder / kept).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    spec = sys.modules["__main__"].__spec__
    made_by = made_by or f"-m {spec.name if spec else Path(sys.argv[0]).stem}"
    head = f"# {title}\n\n{made['date']}, {' and '.join(machines)}.\nMade by `python {made_by}` from [{kept}]({kept})."
    if not stamps:
        head += f"\n\n{UNSTAMPED}"
    path.write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
    return path


def amend(path: Path) -> None:
    """Replace values in the record next to a report by the noted values of the same names."""
    record = path.with_suffix(".json")
    data = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"record": {}}
    data["record"] |= _NOTED
    data["amended"] = stamp()
    record.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def add_line(store: Path, data: Any) -> None:
    """Append a line of JSON to a store, with its stamp."""
    with store.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(data) | {"made": stamp()}) + "\n")


def lines_of(store: Path) -> list[dict[str, Any]]:
    """Return the records of a results file without their stamps, or an empty list if there is no file."""
    if not store.exists():
        return []
    lines = [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "made"} for line in lines]


def stamps_of(store: Path) -> Iterator[dict[str, str]]:
    """Yield the stamps of a results file's records: date and machine."""
    for line in store.read_text(encoding="utf-8").splitlines():
        if '"made"' in line and isinstance(found := json.loads(line).get("made"), dict):
            yield found


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: dataclasses by their fields, arrays as lists, keys that are not text as text.

    Raises:
        TypeError: The value is not plain data.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {_key(key): plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if isinstance(value, Path):
        return value.name
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a record holds plain data, not {type(value).__name__}")


def _key(key: Any) -> str:
    return key if isinstance(key, str) else " x ".join(map(str, key)) if isinstance(key, tuple) else str(key)


class Kept:
    """Plain results by key, kept in the cache of AutoDistill as lines of JSON. A known result is not made again.

    Args:
        name: The benchmark's name.
        source: A hash of everything that the results follow from. Results made from another source are ignored.
        seconds: Time budget. It ends after the current result.
    """

    def __init__(self, name: str, source: str, seconds: float = float("inf")) -> None:
        self._path = cache_folder() / "benchmarks" / f"{name}-{source}.jsonl"
        self._deadline = time.monotonic() + seconds
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        entries = [json.loads(line) for line in lines]
        self._known = {entry["key"]: entry["value"] for entry in entries}
        self._made = {entry["key"]: entry["made"] for entry in entries if "made" in entry}

    def knows(self, key: str) -> bool:
        """Return whether the result of this key is known."""
        return key in self._known

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the result of a key. Make and store it if it is not known, and note it for the report's record.

        Raises:
            SystemExit: The time budget is used up.
        """
        if key not in self._known:
            if time.monotonic() > self._deadline:
                sys.exit(f"the time is over with {len(self._known)} results: call again for the rest")
            value = make()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            made = stamp()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "value": value, "made": made}) + "\n")
            self._known[key] = json.loads(json.dumps(value))
            self._made[key] = made
            if len(self._known) % 50 == 0:
                print(f"{len(self._known)} results, {key}", file=sys.stderr, flush=True)
        note(key, self._known[key], self._made.get(key))
        return self._known[key]
