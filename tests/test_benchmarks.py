"""Every benchmark can be loaded with the package as it is now."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"
# What a program alone needs, and no extra installs.
NEEDED = {"torchao_reference": "torchao"}


def test_every_benchmark_is_loaded():
    names = [
        path.stem
        for path in sorted(FOLDER.glob("*.py"))
        if path.stem not in NEEDED or importlib.util.find_spec(NEEDED[path.stem])
    ]
    assert len(names) > 30
    call = [sys.executable, "-c", f"import {', '.join(names)}"]
    done = subprocess.run(call, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
