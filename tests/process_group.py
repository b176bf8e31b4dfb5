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

    After its work a process once called `destroy_process_group`, and glibc ended one about there with "double free or
    corruption": threads of gloo may still hold what was sent. A search ends the members of a group at once too.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
