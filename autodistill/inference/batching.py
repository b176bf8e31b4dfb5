"""Batches over many sequences: several in a pass, or on a CPU one on each core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from autodistill.estimates.training_fit import CPU_PASS_TOKENS
from autodistill.inference.torch_memory import free_bytes, give_back_memory, is_out_of_memory
from autodistill.models.config import spec_from_config

Result = TypeVar("Result")

PASS_TOKENS = 16_384
"""Tokens of a pass on an accelerator: with fewer, a small model's kernels end before the next ones are launched."""
# Results that may wait for a slow consumer, for each thread.
_AHEAD = 4
# Of what is free of an accelerator's memory, a pass may take so much by its estimate; out of memory halves it.
_SHARE = 0.5
# Logits held at once on an accelerator, in float32; what is computed of them takes a few times as much.
_LOGITS_BYTES = 2**28


def map_sequences(work: Callable[[int], Result], count: int, device: str) -> Iterator[Result]:
    """Yield `work(0)` to `work(count - 1)` in order.

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


def map_batches(
    work: Callable[[range], Result], count: int, take: Callable[[int, int], int], limit: int, device: str
) -> Iterator[Result]:
    """Yield the results of `work` for successive batches of `count` items, in order.

    Where an accelerator's memory runs out, the batch is made smaller, and all that follow it with it.

    Args:
        work: Of the items of a batch; called again with fewer where it ran out of memory.
        count: Number of items.
        take: Where the batch ends that begins at an item, given its limit: one item at least.
        limit: Of a batch, in tokens or what else `take` counts.
        device: "cpu", on which batches run side by side as in `map_sequences`, or an accelerator.
    """
    if device == "cpu":
        batches: list[range] = []
        start = 0
        while start < count:
            batches.append(range(start, take(start, limit)))
            start = batches[-1].stop
        yield from map_sequences(lambda index: work(batches[index]), len(batches), device)
        return
    start = 0
    while start < count:
        stop = take(start, limit)
        try:
            found = work(range(start, stop))
        except RuntimeError as error:
            if not is_out_of_memory(error) or stop - start == 1:
                raise
        else:
            yield found
            start = stop
            continue
        # Outside of the handler, whose traceback holds on to the tensors of the failed pass.
        half = start + (stop - start) // 2
        while take(start, limit) > half:
            limit //= 2
        give_back_memory()


def by_length(lengths: Sequence[int]) -> Callable[[int, int], int]:
    """Return the `take` function of `map_batches` for items that are padded to the longest, longest first."""

    def take(start: int, tokens: int) -> int:
        return min(len(lengths), start + max(1, tokens // lengths[start]))

    return take


def pass_tokens(model: Any, device: str, most: int | None = None) -> int:
    """Return the tokens of a forward pass: `CPU_PASS_TOKENS`; on an accelerator `most`, or what memory allows.

    Counted are a layer's activations and all layers' keys and values in float32, and not what is made of logits, which
    are computed for `logit_rows` at a time.

    Args:
        model: A causal language model of transformers on `device`.
        device: Where it lies.
        most: More than these are of no use on an accelerator; `PASS_TOKENS` by default.
    """
    if device == "cpu":
        return CPU_PASS_TOKENS
    most = PASS_TOKENS if most is None else most
    free = free_bytes(device)
    if free is None:
        return most
    spec = spec_from_config(model.config.to_dict())
    layer = 8 * spec.width + 4 * spec.ffn_width
    each = 4 * (layer + 2 * spec.layers * spec.kv_heads * spec.head_dim)
    return max(1, min(most, int(_SHARE * free) // each))


def logit_rows(vocabulary: int) -> int:
    """Return the number of logit rows that are processed at once on an accelerator."""
    return max(1, _LOGITS_BYTES // (4 * vocabulary))
