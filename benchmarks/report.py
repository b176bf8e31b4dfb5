"""What the benchmark programs share: a dated Markdown report that names the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autodistill.hardware import detect
from autodistill.units import format_bytes

REPORTS = Path(__file__).parent / "reports"
# Of a CPU's instructions those that decide how fast it multiplies, the fastest first.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def machine() -> str:
    """One line about this machine and the packages that matter."""
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
    """A Markdown table."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def write(name: str, title: str, sections: Iterable[str], made_by: str = "") -> Path:
    """Writes `reports/<date>-<name>.md` and returns its path.

    Args:
        name: Of the report; the program is called likewise, unless `made_by` says what was called.
        title: Its first line.
        sections: Its parts.
        made_by: The program, as Python is given it.
    """
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"{today}-{name}.md"
    by = made_by or f"benchmarks/{name.replace('-', '_')}.py"
    head = f"# {title}\n\n{today}, {machine()}.\nMade by `python {by}`."
    path.write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
    return path
