"""Work on many sequences at once: on a CPU each core takes sequences of its own, without waiting for the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Results that may wait for a slow consumer, for each thread.
_AHEAD = 4


def map_sequences(work: Callable[[int], Result], count: int, device: str) -> Iterator[Result]:
    """Yields `work(0)` to `work(count - 1)` in order.

    On a CPU, as many calls run side by side as torch has threads, each with one thread. That is faster than all threads
    on one call, whose every operation waits for the slowest thread: a third when idle, several times when another
    process takes a core. What a call computes does not depend on the number of threads.

    Args:
        work: Called from several threads; a thread has its own grad mode and autocast, so it sets both itself.
        count: Number of calls.
        device: "cpu", or an accelerator, on which calls run one after another.
    """
    threads = torch.get_num_threads()
    if device != "cpu":
        yield from map(work, range(count))
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="sequences") as pool:
            waiting: deque[Future[Result]] = deque()
            for index in range(count):
                waiting.append(pool.submit(work, index))
                if len(waiting) >= _AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
