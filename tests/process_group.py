"""How a test's process in a gloo group ends."""

import faulthandler
import os
import sys

import torch


def begin() -> None:
    """Show the stack of each thread if this process crashes."""
    faulthandler.enable(all_threads=True)


def leave() -> None:
    """End this process once all of its group are here, without the destructors of gloo and torch.

    Processes used to call `destroy_process_group` after their work. glibc then ended one at about that point with
    "double free or corruption", because threads of gloo may still hold what was sent. A search also ends the members of
    a group at once.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
