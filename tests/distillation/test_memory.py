"""Freed memory is kept, so that a process that allocates again faults no pages in again; full memory is known."""

import platform
import subprocess
import sys

import pytest
import torch

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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=str,
)
def test_memory_that_is_full_is_known_by_any_of_its_names(error):
    assert memory.is_out_of_memory(error)


def test_other_errors_are_not_taken_for_full_memory():
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory")):
        assert not memory.is_out_of_memory(error)


def test_nothing_is_asked_of_a_gpu_that_is_not_there():
    memory.give_back_memory()
