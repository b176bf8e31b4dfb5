"""Memory of a process that uses torch: keeps freed blocks, gives memory back, and detects a lack of memory."""

from __future__ import annotations

import ctypes
import gc
import platform

import torch

# Constants of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
# GPU memory that a process takes outside of torch's allocator, for CUDA's context and loaded kernels.
_CONTEXT_BYTES = 600 * 10**6


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 32 MiB; with other C libraries this does nothing.

    By default, such blocks go back to the system at the end of a step. The next step must then clear all their pages
    again, which causes half of all page faults of a step on a CPU. The process keeps its peak of such memory until it
    ends.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Free unused objects, and the GPU memory that torch caches for this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def freeze_garbage_collection() -> None:
    """Exclude all present objects from garbage collection; they stay until the process ends.

    Importing the libraries alone creates half a million objects. Checking them takes a quarter of a second whenever
    memory is given back.
    """
    gc.freeze()


def share_bytes(total: int, share: float, free: int | None = None) -> int:
    """Return the GPU bytes that each process may allocate, whether it shares the GPU or has it alone.

    The remaining memory holds the contexts of all processes, and that of the search itself, which stays.

    Args:
        total: All bytes of the GPU.
        share: Share of a process, at most 1.
        free: Unused bytes of the GPU, when the search's own context is in memory; by default everything else is unused.
    """
    left = total - _CONTEXT_BYTES if free is None else min(free, total - _CONTEXT_BYTES)
    return max(0, int(share * left - _CONTEXT_BYTES))


def keep_to_share(share: float) -> None:
    """Limit this process to its share of a GPU, so that it runs out of memory before it takes the share of others."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(share_bytes(total, share) / total)


def free_bytes(device: str) -> int | None:
    """Return the GPU memory that this process may still allocate, or None for devices that do not report it."""
    if torch.device(device).type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    # Freed memory that torch keeps is available to its next tensors.
    most = min(free + torch.cuda.memory_reserved(), torch.cuda.get_per_process_memory_fraction() * total)
    return max(0, int(most - torch.cuda.memory_allocated()))


class StepOutOfMemory(Exception):
    """A shared step ran out of memory in this process, and the other processes would wait for its part for ever.

    All of them must end, and new ones must continue from the last checkpoint.

    Args:
        micro_batch: Micro-batch, in sequences of each process, with which to try the step again.
    """

    def __init__(self, micro_batch: int) -> None:
        super().__init__(
            f"out of memory: go on from the last checkpoint in new processes, with micro_batch {micro_batch}"
        )
        self.micro_batch = micro_batch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on an accelerator or in main memory.

    In addition to torch's allocators, CUDA's libraries allocate memory themselves. "CUDA error: out of memory" comes
    from the driver, and CUBLAS_STATUS_ALLOC_FAILED from cuBLAS.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    words = ("out of memory", "alloc_failed")
    return isinstance(error, RuntimeError) and (
        any(word in said for word in words) or ("alloc" in said and "memory" in said)
    )
