"""The bundle of an ONNX export is an example that generates text with a library, with the same smoke test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autodistill.bundle.write import write_bundle
from tests.bundle.conftest import Q8_0, export_to


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    export = export_to(folder, "onnx", Q8_0.__class__(**{**Q8_0.to_json(), "keep": (), "cache_type_k": "f16"}), None)
    write_bundle(export, folder / "bundle")
    return folder / "bundle"


def test_it_has_the_example_the_smoke_test_and_what_they_need(bundle: Path) -> None:
    names = {path.name for path in bundle.iterdir()}
    assert names == {
        *("README.md", "example.py", "requirements.txt", "smoke_test.py", "answers.json", "SHA256SUMS", "model")
    }
    assert json.loads((bundle / "answers.json").read_text())["runtime"] == "onnxruntime"


def test_a_library_that_is_not_there_is_named(bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", bundle / "smoke_test.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "onnxruntime-genai is not installed" in done.stdout


@pytest.mark.system
def test_the_example_writes_and_the_smoke_test_knows_the_student_again(bundle: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    written = subprocess.run(
        [sys.executable, bundle / "example.py", "Hello"], capture_output=True, text=True, timeout=100
    )
    assert written.returncode == 0, written.stderr
    done = subprocess.run([sys.executable, bundle / "smoke_test.py"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout[:3]) == (0, "ok:"), done.stdout + done.stderr
