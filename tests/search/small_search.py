"""A small search that several tests share: a tiny teacher, a text, and a space of two dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.search.request.request import SearchRequest
from autodistill.search.solve.options import Options
from autodistill.testing import save_tiny_teacher, tiny_text

SPACE = """
name: small
dimensions:
  init.depth: {low: 0.6, high: 0.8, step: 0.2}
  distillation.learning_rate: {low: 1e-3, high: 3e-3, log: true}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
"""


def small_inputs(folder: Path) -> Path:
    """Return the folder with a teacher, a text and the space."""
    save_tiny_teacher(folder / "teacher", layers=5)
    tiny_text(folder / "text", documents=30, sentences=24)
    (folder / "small.yaml").write_text(SPACE)
    return folder


def small_request(inputs: Path, out: Path, **changes: Any) -> SearchRequest:
    """Return a request for a search in this process, with a test's changes."""
    fields: dict[str, Any] = {
        "budget": Budget(memory_bytes=16 * 10**9, context=256),
        "space": str(inputs / "small.yaml"),
        "teacher": str(inputs / "teacher"),
        "data": str(inputs / "text"),
        "trials": 1,
        "tokens": 2304,
        "runner": "inline",
        "runs": out,
        "name": "run",
        "cache": inputs / "cache",
    }
    return SearchRequest(**(fields | changes))


def middle_budget(teacher: Path, context: int) -> Budget:
    """Return a budget half-way between the teacher in its fewest bits and in eight, so that types have to be chosen."""
    spec = spec_from_config(json.loads((teacher / "config.json").read_text()))
    options = Options(spec=spec, budget=Budget(memory_bytes=10**9, context=context))
    wide = options.deployment(dict.fromkeys(options.matrices | options.tables, "q8_0"), ("f16", "f16"))
    memory = (options.smallest()[1].total_bytes + options.memory(wide).total_bytes) // 2
    return Budget(memory_bytes=memory, context=context)
