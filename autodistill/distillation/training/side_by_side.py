"""Processes beside this one that compute the gradients of a part of each step, on parameters that all of them share."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

MOST = 4
"""Processes that a step is divided among: of more the steps would come to be too few."""

Work = Callable[..., dict[str, float]]
"""Adds gradients to the parameters, and returns sums of what it found."""


def usable(device: str) -> bool:
    """Return whether a process may go on as two: on a CPU, where nothing has been begun on an accelerator."""
    return device == "cpu" and hasattr(os, "fork") and not torch.cuda.is_available()


class SideBySide:
    """Copies of this process as it is now, each of which works on a part of a step when it is asked to.

    Two processes of one thread each train 1.3 to 1.5 times as fast as one of two threads: of a step of few tokens much
    is done in one thread. They are forks, so that the model, its codes and its teacher are in memory once. The
    parameters are moved into memory that all see, where the optimizer of this process changes them.

    Args:
        work: What is asked for, in this process's words; in a copy it finds all as it is now.
        parameters: All that are trained.
        count: Copies.
        threads: Of each.
    """

    def __init__(self, work: Work, parameters: Sequence[nn.Parameter], count: int, threads: int = 1) -> None:
        self._parameters = parameters
        for parameter in parameters:
            parameter.data = _shared(parameter.data)
        context = multiprocessing.get_context("fork")
        self._gradients = [[_shared(torch.zeros_like(one)) for one in parameters] for _ in range(count)]
        self._pipes: list[Connection] = []
        self._processes = []
        for gradients in self._gradients:
            ours, theirs = context.Pipe()
            arguments = (ours, theirs, work, parameters, gradients, threads)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, *requests: tuple[Any, ...]) -> None:
        """Begin the work of as many copies, each with arguments of its own."""
        self._asked = self._pipes[: len(requests)]
        for pipe, request in zip(self._asked, requests, strict=True):
            with contextlib.suppress(OSError):  # of one that is gone, which its answer says
                pipe.send(request)

    def answers(self) -> list[dict[str, float]]:
        """Wait for what was begun, add its gradients to those of this process, and return what the copies found.

        Raises:
            RuntimeError: The work failed in a copy, or the copy is gone.
        """
        found, failed = [], None
        for place, pipe in enumerate(self._asked):
            try:
                error, sums = pipe.recv()
            except (EOFError, OSError):
                self._processes[place].join()
                error, sums = f"a process of the training ended with code {self._processes[place].exitcode}", {}
            failed = failed or error
            found.append(sums)
        if failed:
            raise RuntimeError(failed)
        for place in range(len(self._asked)):
            for parameter, arrived in zip(self._parameters, self._gradients[place], strict=True):
                parameter.grad = arrived.clone() if parameter.grad is None else parameter.grad.add_(arrived)
        return found

    def close(self) -> None:
        """End the copies."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.kill()
            process.join()


def _shared(values: Tensor) -> Tensor:
    """Return the same values in memory that forks see too."""
    held = torch.frombuffer(mmap.mmap(-1, max(1, values.nbytes)), dtype=values.dtype, count=values.numel())
    return held.view(values.shape).copy_(values)


def _serve(
    ours: Connection,
    theirs: Connection,
    work: Work,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    threads: int,
) -> None:
    """Answer until the process that asks is gone, which closes the pipe."""
    ours.close()
    # Ctrl-C reaches both, and it is the other's to end this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):
        while True:
            theirs.send(_answer(theirs.recv(), work, parameters, gradients))
    os._exit(0)


def _answer(
    request: tuple[Any, ...], work: Work, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]
) -> tuple[str | None, dict[str, float]]:
    """Do what is asked, write down its gradients, and return what failed, or None, and the sums."""
    try:
        for parameter in parameters:
            parameter.grad = None
        sums = work(*request)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad)
    except Exception as error:
        return f"{type(error).__name__}: {error}", {}
    return None, sums
