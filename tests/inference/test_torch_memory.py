"""Freed memory is kept, so a process that allocates again causes no page faults; full memory is recognised."""

import platform
import subprocess
import sys

import pytest
import torch

from autodistill.inference import torch_memory as memory

PROGRAM = """
import resource, sys
import torch
from autodistill.inference.torch_memory import keep_freed_memory

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


@pytest.mark.slow
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


@pytest.mark.parametrize("total", [8 * 10**9, 24 * 10**9, 80 * 2**30])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.25, 0.1])
def test_shares_of_a_gpu_leave_room_for_every_context(total, share):
    each, processes = memory.share_bytes(total, share), int(1 / share)
    # A context takes about 600 MB. Each process has one, and so has the search.
    assert processes * each + (processes + 1) * 600e6 <= total
    assert each == 0 or each >= share * total - 1.2e9


class Gpu:
    """What torch says about a GPU of 24 GB: others have 10 GB; this process reserves 4 GB and uses 3 GB."""

    def __init__(self, monkeypatch):
        self.fraction = 1.0
        told = {"memory_reserved": 4 * 10**9, "memory_allocated": 3 * 10**9, "mem_get_info": (10**10, 24 * 10**9)}
        for name, value in told.items():
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: self.fraction)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.set)

    def set(self, fraction):
        self.fraction = fraction


def test_a_process_that_keeps_to_its_share_has_what_that_leaves_free(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert memory.free_bytes("cuda") == 11 * 10**9
    memory.keep_to_share(0.5)
    # 12 GB minus its own context and half of the search's.
    assert gpu.fraction * 24e9 == pytest.approx(11.1e9)
    assert memory.free_bytes("cuda") == pytest.approx(8.1e9, abs=1)
    memory.keep_to_share(0.01)
    assert (gpu.fraction, memory.free_bytes("cuda")) == (0, 0)
    assert memory.free_bytes("cpu") is None
