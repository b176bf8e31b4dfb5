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

    After its work a process called `destroy_process_group`, and one was once ended there, or about there, by glibc with "double
    free or corruption": gloo's threads may still hold what was sent. A search's own groups end by SIGKILL.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
