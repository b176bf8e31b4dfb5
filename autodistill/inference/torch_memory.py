"""Memory of this process under torch: keeping freed blocks, giving memory back, and detecting a lack of it."""

from __future__ import annotations

import ctypes
import gc
import platform

import torch

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
# Of a GPU, what a process takes outside of torch's allocator: CUDA's context, and the kernels that were loaded.
_CONTEXT_BYTES = 600 * 10**6


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 32 MiB; with other C libraries this does nothing.

    By default such blocks go back to the system at the end of a step, which must clear every page of them again in the
    next: half of all page faults of a step on a CPU. The process keeps its peak of such memory until it ends.
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


def settle() -> None:
    """Exclude all present objects from garbage collection: they stay until the process ends.

    What the libraries make as they are imported alone is half a million objects, and looked at for a quarter of a
    second whenever memory is given back.
    """
    gc.freeze()


def share_bytes(total: int, share: float, free: int | None = None) -> int:
    """Return the bytes of a GPU that each process sharing it may allocate, or the only one.

    The contexts of all of them, and that of the search itself, which stays, find room beside that.

    Args:
        total: All of the GPU's.
        share: Of a process, 1 at the most.
        free: What nobody has of it, beside the search's own context; by default all but that.
    """
    left = total - _CONTEXT_BYTES if free is None else min(free, total - _CONTEXT_BYTES)
    return max(0, int(share * left - _CONTEXT_BYTES))


def keep_to_share(share: float) -> None:
    """Limit this process to its share of a GPU, so that it runs out of memory before it takes the share of others."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(share_bytes(total, share) / total)


def free_bytes(device: str) -> int | None:
    """Return the GPU memory that this process may still allocate; None for devices that do not report it."""
    if torch.device(device).type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    # What torch keeps of freed memory is free for its next tensors.
    most = min(free + torch.cuda.memory_reserved(), torch.cuda.get_per_process_memory_fraction() * total)
    return max(0, int(most - torch.cuda.memory_allocated()))


class TooManyAtOnce(Exception):
    """A shared step ran out of memory in this process; the other processes wait for its part for ever.

    All of them are to end, and new ones to go on from the last checkpoint.

    Args:
        fewer: Sequences at once, of each process, that the step is to be tried with.
    """

    def __init__(self, fewer: int) -> None:
        super().__init__(f"out of memory: go on from the last checkpoint in new processes, with micro_batch {fewer}")
        self.fewer = fewer


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on an accelerator or in main memory.

    Beside torch's allocators, CUDA's libraries ask for memory of their own: "CUDA error: out of memory" comes from its
    driver, CUBLAS_STATUS_ALLOC_FAILED from cuBLAS.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    words = ("out of memory", "alloc_failed")
    return isinstance(error, RuntimeError) and (
        any(word in said for word in words) or ("alloc" in said and "memory" in said)
    )
