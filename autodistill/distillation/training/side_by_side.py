"""Forks of this process that each compute the gradients of a part of every step, on shared parameters."""

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
"""Largest number of processes that share a step. With more, a training would have too few steps."""

Work = Callable[..., dict[str, float]]
"""A function that adds gradients to the parameters, and returns sums of a step's terms."""


def usable(device: str) -> bool:
    """Return whether this process may fork: only on a CPU, on a machine without CUDA."""
    return device == "cpu" and hasattr(os, "fork") and not torch.cuda.is_available()


class SideBySide:
    """Forks of this process, each of which works on a part of a step on request.

    Two processes of one thread each train 1.3 to 1.5 times as fast as one process of two threads, because much of a
    small step runs in one thread. The processes are forks, so that the model, its codes and its teacher are in memory
    only once. The parameters move into shared memory, where this process's optimiser updates them.

    Args:
        work: The function that a fork calls for each request. It sees everything as it is when the fork starts.
        parameters: All trained parameters.
        count: Number of forks.
        threads: Threads of each fork.
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
        """Send each request, the arguments of one call of `work`, to a fork of its own."""
        self._asked = self._pipes[: len(requests)]
        for pipe, request in zip(self._asked, requests, strict=True):
            with contextlib.suppress(OSError):  # the fork is gone, and `answers` will report it
                pipe.send(request)

    def answers(self) -> list[dict[str, float]]:
        """Wait for the requests, add the forks' gradients to this process's, and return the sums of each fork.

        Raises:
            RuntimeError: The work failed in a fork, or the fork is gone.
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
        """End the forks."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.kill()
            process.join()


def _shared(values: Tensor) -> Tensor:
    """Return a copy of the values in memory that forks share."""
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
    """Answer requests until the parent process is gone, which closes the pipe."""
    ours.close()
    # Ctrl-C reaches both processes, but only the parent may end this one.
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
    """Do the work of a request, copy its gradients to shared memory, and return an error or None, and the sums."""
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
