"""How a test's process of a gloo group ends."""

import faulthandler
import os
import sys

import torch


def begin() -> None:
    """Show the stack of each thread where this process crashes."""
    faulthandler.enable(all_threads=True)


def leave() -> None:
    """End this process once all of its group are here, without the destructors of gloo and torch.

    Threads of gloo may still hold what was gathered while the interpreter goes: glibc once ended a process there with
    "double free or corruption" (SIGABRT), after all of its work had been written.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
