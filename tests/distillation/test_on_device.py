"""Run the tests of a device other than the CPU, in a process of their own that uses the device from the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "on_device"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_on_a_device(which):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, str(FOLDER)]
    environment = os.environ | {"AUTODISTILL_TEST_DEVICE": "pretend"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
