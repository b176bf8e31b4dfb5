"""What goes into each matrix of a model as it reads, and the gradients of what comes out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from threading import local
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autodistill.errors import InputError
from autodistill.estimates.solving import LOGITS
from autodistill.inference.batching import map_sequences

Taken: TypeAlias = list[tuple[int, Tensor, Tensor]]
"""Of a matrix: which of those that lie in one tensor, what went in, [n, in], and the gradients behind it, [n, out]."""

_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm")


class _Experts(TorchFunctionMode):
    """Watches the products with experts' matrices, which lie in one tensor and not in modules of their own.

    Args:
        names: Of the watched tensors, by their `id`.
        watch: Is given the name of one, the expert, what goes into it and what comes out.
    """

    def __init__(self, names: Mapping[int, str], watch: Callable[[str, int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._names, self._watch = names, watch
        self._slices: dict[int, tuple[str, int, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and notes what it did with a watched tensor."""
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__getitem__" and id(args[0]) in self._names:
            # Held as well, so that its id stays its own.
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
"""Reads a sequence with gradients: what comes out, and what gives the gradient there once nothing is watched."""


def watched(model: Any, names: Sequence[str], read: Read, count: int, device: str) -> list[dict[str, Taken]]:
    """What goes into each matrix, and the gradients at its outputs, of each sequence.

    Args:
        model: In float32.
        names: Of its matrices.
        read: Called for each sequence, from several threads.
        count: Of sequences.
        device: Where the model lies.

    Raises:
        InputError: Experts that are computed in a way that cannot be watched.
    """
    here = local()

    def note(name: str, expert: int, taken: Tensor, given: Tensor) -> None:
        found, taken = here.found, taken.detach().flatten(0, -2)
        if given.requires_grad:
            given.register_hook(lambda slope: found[name].append((expert, taken, slope.flatten(0, -2))))

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        note(name, 0, inputs[0], output)

    def back_and_forth(index: int) -> dict[str, Taken]:
        here.found = defaultdict(list)
        with torch.enable_grad(), ExitStack() as modes:
            if inside:
                modes.enter_context(_Experts(inside, note))
            states, slope = read(index)
            modes.close()
            states.backward(slope())
        found: dict[str, Taken] = here.found
        return found

    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = dict(model.named_parameters())
    inside = {id(parameters[name]): name for name in names if parameters[name].dim() == 3}
    with ExitStack() as hooks:
        for parameter in wanted:
            parameter.requires_grad_(False)
            hooks.callback(parameter.requires_grad_, True)
        for name in names:
            if id(parameters[name]) not in inside:
                module = model.get_submodule(name.removesuffix(".weight"))
                hooks.callback(module.register_forward_hook(partial(watch, name)).remove)
        found = list(map_sequences(back_and_forth, count, device))
    unseen = [name for name in names if not any(one.get(name) for one in found)]
    if unseen:
        raise InputError(f"nothing is known to go through {unseen[0]}, so that its types cannot be scored")
    return found


def chances_of(tokens: Tensor, seed: int) -> list[Tensor]:
    """Numbers from 0 to 1 by which tokens are drawn, float64 [length, 1] of each sequence.

    Args:
        tokens: int64 [sequences, length].
        seed: Of the numbers.
    """
    dice = torch.Generator(device="cpu").manual_seed(seed)
    return [torch.rand(tokens.shape[1], 1, generator=dice, dtype=torch.float64) for _ in tokens]


def of_drawn_tokens(model: Any, states: Tensor, chances: Tensor) -> Tensor:
    """The gradient at the last states, [length, width], of the log-probability of a token drawn at each.

    Args:
        model: Whose head it is.
        states: [length, width].
        chances: Numbers from 0 to 1, by which the tokens are drawn, float64 [length, 1].
    """
    head, slopes = model.get_output_embeddings(), []
    at_once = max(1, LOGITS // head.weight.shape[0])
    for rows, drawn_at in zip(states.split(at_once), chances.to(states.device).split(at_once), strict=True):
        leaf = rows.clone().requires_grad_()
        log_probabilities = torch.log_softmax(head(leaf).float(), dim=-1)
        # By the inverse of the distribution, so that the draw is the same wherever the model lies.
        sums = log_probabilities.detach().double().exp_().cumsum(dim=-1)
        drawn = torch.searchsorted(sums, drawn_at * sums[:, -1:]).clamp(max=sums.shape[1] - 1)
        del sums
        log_probabilities.gather(1, drawn).sum().backward()
        assert leaf.grad is not None
        slopes.append(leaf.grad)
    return torch.cat(slopes)
