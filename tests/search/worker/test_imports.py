"""A worker does not import libraries that it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.testing import save_tiny_teacher, tiny_text

# The script loads what a worker imports, all evaluators that it may need, and the data that it reads.
WORKER = """
import sys
from pathlib import Path
import autodistill.search.runners.ray, autodistill.search.runners.process_group
import autodistill.search.worker.attempt, autodistill.search.worker.context
import autodistill.search.worker.failures, autodistill.search.worker.messages, autodistill.search.worker.trial
from autodistill import plugins
from autodistill.data.dataset import load_split
for name in plugins.names("evaluators"):
    plugins.load("evaluators", name)
for split in ("train", "validation", "test"):
    load_split(Path(sys.argv[1]), split)
print([name for name in ("datasets", "evaluate", "altair") if name in sys.modules])
"""


@pytest.mark.slow  # starts a fresh process
def test_a_worker_imports_neither_datasets_nor_evaluate(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher")
    data = prepare(resolve_data(str(tiny_text(tmp_path / "text"))), teacher, "tokenizer", 32, tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", WORKER, str(data.folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
