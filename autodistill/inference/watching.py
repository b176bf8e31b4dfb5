"""Records the input of each matrix of a model as it reads, and the gradients at its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from threading import local
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autodistill.errors import InputError
from autodistill.estimates.solving import LOGITS
from autodistill.inference.batching import map_sequences
from autodistill.inference.blocks import embedded, one_block, only_blocks, through_block

Taken: TypeAlias = list[tuple[int, Tensor, Tensor]]
"""Records of a matrix: index of the expert if experts share a tensor, input [n, in], and output gradients [n, out]."""

_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm")


class _Experts(TorchFunctionMode):
    """Watches products with experts' matrices, which lie in one tensor and have no modules of their own.

    Args:
        names: Names of the watched tensors, by their `id`.
        watch: Called with the tensor's name, the expert, the input and the output of the product.
    """

    def __init__(self, names: Mapping[int, str], watch: Callable[[str, int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._names, self._watch = names, watch
        self._slices: dict[int, tuple[str, int, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and note what it did with a watched tensor."""
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__getitem__" and id(args[0]) in self._names:
            # Keep a reference to the slice, so that no other tensor gets its id.
            self._slices[id(found)] = (self._names[id(args[0])], int(args[1]), found)
        elif name in _PRODUCTS and len(args) > 1:
            if id(args[1]) in self._slices:
                tensor, expert, _ = self._slices[id(args[1])]
                self._watch(tensor, expert, args[0], found)
            elif id(args[1]) in self._names:
                for expert, (taken, given) in enumerate(zip(args[0], found, strict=True)):
                    self._watch(self._names[id(args[1])], expert, taken, given)
        return found


Read: TypeAlias = Callable[[int], tuple[Tensor, Callable[[], Tensor]]]
"""Reads a sequence with gradients. Returns the output, and a function that gives its gradient after watching ended."""


def watched(model: Any, names: Sequence[str], read: Read, count: int, device: str) -> list[dict[str, Taken]]:
    """Return the input of each matrix and the gradients at its output, for each sequence.

    Args:
        model: A float32 model.
        names: Names of its matrices.
        read: Called for each sequence, from several threads.
        count: Number of sequences.
        device: Where the model lies.

    Raises:
        InputError: Experts are computed in a way that cannot be watched.
    """
    here = local()

    def note(name: str, expert: int, taken: Tensor, given: Tensor) -> None:
        found, taken = here.found, taken.detach().flatten(0, -2).float()
        if given.requires_grad:
            given.register_hook(lambda slope: found[name].append((expert, taken, slope.flatten(0, -2).float())))

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        note(name, 0, inputs[0], output)

    def back_and_forth(index: int) -> dict[str, Taken]:
        """Return the records of one sequence from a forward and a backward pass."""
        here.found = defaultdict(list)
        with torch.enable_grad(), ExitStack() as modes:
            if inside:
                modes.enter_context(_Experts(inside, note))
            states, slope = read(index)
            modes.close()
            states.backward(slope())
        found: dict[str, Taken] = here.found
        return found

    parameters = dict(model.named_parameters())
    inside = {id(parameters[name]): name for name in names if parameters[name].dim() == 3}
    with ExitStack() as hooks:
        hooks.enter_context(_frozen(model))
        for name in names:
            if id(parameters[name]) not in inside:
                module = model.get_submodule(name.removesuffix(".weight"))
                hooks.callback(module.register_forward_hook(partial(watch, name)).remove)
        found = list(map_sequences(back_and_forth, count, device))
    unseen = [name for name in names if not any(one.get(name) for one in found)]
    if unseen:
        raise InputError(f"nothing is known to go through {unseen[0]}, so that its types cannot be scored")
    return found


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Let no parameter have a gradient within the context."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def watched_by_block(
    model: Any,
    block: Callable[[int], AbstractContextManager[list[str]]],
    layers: int,
    names: Sequence[str],
    tokens: Tensor,
    seed: int,
    device: str,
) -> Iterator[dict[str, list[Taken]]]:
    """Yield, by block, the inputs of matrices and the gradients at their outputs of drawn tokens' log-probability.

    The last block comes first. The states before each block are kept, and each block is computed once more from them.
    Thus memory holds the records of only one block.

    Args:
        model: A float32 model of a supported family.
        block: Returns a context in which a block has its weights, and which yields their names.
        layers: Number of blocks.
        names: Names of matrices in blocks.
        tokens: int64 [sequences, length].
        seed: Seed of the drawn tokens.
        device: Where the model lies.

    Yields:
        The records of a block's matrices by name, one list for each sequence; the block has its weights meanwhile.
    """
    chances, wanted = chances_of(tokens, seed), set(names)

    def behind(index: int) -> Tensor:
        """Return the gradient behind the last block for one sequence."""
        leaf = given[-1][index].clone().requires_grad_()
        with torch.enable_grad():
            last = model.base_model(inputs_embeds=leaf, use_cache=False).last_hidden_state
            last.backward(of_drawn_tokens(model, last.detach()[0], chances[index])[None])
        assert leaf.grad is not None
        return leaf.grad

    given = [embedded(model, tokens.numpy(), device)]
    for index in range(layers):
        with block(index):
            given.append([one.after for one in through_block(model, index, given[-1], device=device)])
    with _frozen(model):
        with only_blocks(model, ()):
            slopes = list(map_sequences(behind, len(tokens), device))
        given.pop()
        for index in reversed(range(layers)):
            with block(index) as inside:
                part = [name for name in inside if name in wanted]
                found, slopes = _back(model, index, part, given.pop(), slopes, device)
                yield {name: [one.pop(name, []) for one in found] for name in part}


def _back(
    model: Any, index: int, names: Sequence[str], given: Sequence[Tensor], slopes: Sequence[Tensor], device: str
) -> tuple[list[dict[str, Taken]], list[Tensor]]:
    """Return a block's records, and the gradients before it.

    Args:
        model, names, device: As for `watched`.
        index: Index of the block.
        given: The block's input for each sequence.
        slopes: The gradients behind the block.
    """
    leaves = [one.clone().requires_grad_() for one in given]
    with one_block(model, index) as run:
        found = watched(
            model, names, lambda sequence: (run(leaves[sequence]), lambda: slopes[sequence]), len(leaves), device
        )
    before = [leaf.grad for leaf in leaves]
    assert all(one is not None for one in before)
    return found, [one for one in before if one is not None]


def chances_of(tokens: Tensor, seed: int) -> list[Tensor]:
    """Return numbers from 0 to 1 by which tokens are drawn, float64 [length, 1] for each sequence.

    Args:
        tokens: int64 [sequences, length].
        seed: Seed of the numbers.
    """
    dice = torch.Generator(device="cpu").manual_seed(seed)
    return [torch.rand(tokens.shape[1], 1, generator=dice, dtype=torch.float64) for _ in tokens]


def of_drawn_tokens(model: Any, states: Tensor, chances: Tensor) -> Tensor:
    """Return the gradient, at the last states, of the log-probability of a token drawn at each, [length, width].

    Args:
        model: Model whose head is used.
        states: [length, width].
        chances: Numbers from 0 to 1 by which the tokens are drawn, float64 [length, 1].
    """
    head, slopes = model.get_output_embeddings(), []
    at_once = max(1, LOGITS // head.weight.shape[0])
    for rows, drawn_at in zip(states.split(at_once), chances.to(states.device).split(at_once), strict=True):
        leaf = rows.clone().requires_grad_()
        log_probabilities = torch.log_softmax(head(leaf).float(), dim=-1)
        # The draw inverts the cumulative distribution, so that it is the same on every device.
        sums = log_probabilities.detach().double().exp_().cumsum(dim=-1)
        drawn = torch.searchsorted(sums, drawn_at * sums[:, -1:]).clamp(max=sums.shape[1] - 1)
        del sums
        log_probabilities.gather(1, drawn).sum().backward()
        assert leaf.grad is not None
        slopes.append(leaf.grad)
    return torch.cat(slopes)
