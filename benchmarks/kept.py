"""Results of a benchmark by key, a line of JSON each in the cache of AutoDistill: what is there is not made again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.runs.run_folder import default_cache

sys.path.insert(0, str(Path(__file__).parent))

import report


class Kept:
    """Plain results, made once.

    Args:
        name: Of the benchmark.
        source: What the results follow from, as a hash; none made from another is known.
        seconds: Time box; it ends after the result at hand.
    """

    def __init__(self, name: str, source: str, seconds: float = float("inf")) -> None:
        self._path = default_cache() / "benchmarks" / f"{name}-{source}.jsonl"
        self._deadline = time.monotonic() + seconds
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        entries = [json.loads(line) for line in lines]
        self._known = {entry["key"]: entry["value"] for entry in entries}
        self._made = {entry["key"]: entry["made"] for entry in entries if "made" in entry}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of a key, made and written down where it is not known, and noted for the report's record.

        Raises:
            SystemExit: The time is over.
        """
        if key not in self._known:
            if time.monotonic() > self._deadline:
                sys.exit(f"the time is over with {len(self._known)} results: call again for the rest")
            value = make()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                made = report.stamp()
                file.write(json.dumps({"key": key, "value": value, "made": made}) + "\n")
            self._known[key] = json.loads(json.dumps(value))
            self._made[key] = made
            if len(self._known) % 50 == 0:
                print(f"{len(self._known)} results, {key}", file=sys.stderr, flush=True)
        report.note(key, self._known[key], self._made.get(key))
        return self._known[key]


def mean(values: Any, scale: float = 100.0, digits: int = 2) -> str:
    """Mean and standard error, times `scale`."""
    numbers = np.asarray(values, float) * scale
    if len(numbers) < 2:
        return f"{numbers.mean():.{digits}f}"
    return f"{numbers.mean():.{digits}f} ± {numbers.std(ddof=1) / np.sqrt(len(numbers)):.{digits}f}"
