"""Batches over many sequences: several sequences in a pass on an accelerator, or one on each core of a CPU."""

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
"""Tokens of a pass on an accelerator. With fewer, a small model's kernels end before the next ones are launched."""
# Results per thread that may wait for a slow consumer.
_AHEAD = 4
# Share of an accelerator's free memory that a pass may take by its estimate. If memory runs out, the batch is halved.
_SHARE = 0.5
# Bytes of float32 logits held at once on an accelerator; the tensors computed from them take a few times as much.
_LOGITS_BYTES = 2**28


def map_sequences(work: Callable[[int], Result], count: int, device: str) -> Iterator[Result]:
    """Yield `work(0)` to `work(count - 1)` in order.

    On a CPU, as many calls run at the same time as torch has threads, each with one thread. With all threads on one
    call, every operation would wait for the slowest thread. One thread per call is faster: by a third on an idle
    machine, and several times if another process takes a core. The result of a call does not depend on the number of
    threads.

    Args:
        work: Called from several threads. Each thread has its own grad mode and autocast, so `work` sets both itself.
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

    If an accelerator's memory runs out, this batch and all later ones are made smaller.

    Args:
        work: Processes the items of a batch; called again with fewer if it ran out of memory.
        count: Number of items.
        take: Returns the end of the batch that begins at an item, given the limit; a batch has at least one item.
        limit: Limit of a batch, in tokens or in whatever `take` counts.
        device: "cpu", on which batches run at the same time as in `map_sequences`, or an accelerator.
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
        # Free memory outside the handler: its traceback holds on to the tensors of the failed pass.
        half = start + (stop - start) // 2
        while take(start, limit) > half:
            limit //= 2
        give_back_memory()


def by_length(lengths: Sequence[int]) -> Callable[[int, int], int]:
    """Return the `take` function of `map_batches` for items that come longest first and are padded in a batch."""

    def take(start: int, tokens: int) -> int:
        return min(len(lengths), start + max(1, tokens // lengths[start]))

    return take


def pass_tokens(model: Any, device: str, most: int | None = None) -> int:
    """Return the tokens of a forward pass: `CPU_PASS_TOKENS`, or on an accelerator `most`, or fewer if memory is short.

    The estimate counts a layer's activations and all layers' keys and values in float32. It leaves out what is computed
    from logits, because logits are computed for only `logit_rows` at a time.

    Args:
        model: A causal language model of transformers on `device`.
        device: Where the model lies.
        most: Limit on an accelerator, above which more tokens bring nothing; `PASS_TOKENS` by default.
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
