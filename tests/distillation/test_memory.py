"""Freed memory is kept: a process that allocates again does not fault its pages in again."""

import platform
import subprocess
import sys

import pytest

from autodistill.distillation import memory

PROGRAM = """
import resource, sys
import torch
from autodistill.distillation.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    held = [torch.ones(2**20) for _ in range(8)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def _faults(what):
    done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_pages_are_faulted_in_once():
    # Each of the ten steps writes 8 blocks of 4 MiB, which is 8,192 pages of 4 KiB.
    assert _faults("keep") < 8192


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("nothing of the C library is touched"))
    memory.keep_freed_memory()
