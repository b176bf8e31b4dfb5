"""Runs the tests of a device that is not the CPU, in a process of their own, which has it from its beginning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "on_device"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_on_a_device(name):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / name)]
    environment = os.environ | {"AUTODISTILL_TEST_DEVICE": "pretend"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
