"""Runs single blocks of a model; all other blocks pass their input on unchanged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import local
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autodistill.inference.batching import map_sequences
from autodistill.models.families import names_of
from autodistill.models.loading import decoder_layers


class _PassThrough(nn.Module):
    """Replaces a block that is left out, so that the blocks behind it keep their index."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states


@contextmanager
def only_blocks(model: Any, blocks: Collection[int]) -> Iterator[None]:
    """Let a model compute with only some of its blocks within the context.

    Args:
        model: A causal language model of transformers.
        blocks: Indices of the blocks that compute.
    """
    layers, body = decoder_layers(model), model.base_model
    same = _PassThrough()
    body.layers = nn.ModuleList(layer if index in blocks else same for index, layer in enumerate(layers))
    try:
        yield
    finally:
        body.layers = layers


def embedded(model: Any, tokens: npt.NDArray[Any], device: str = "cpu") -> list[Tensor]:
    """Return the states of each sequence before the first block, [1, length, width].

    Args:
        model: A float32 model on `device`.
        tokens: [sequences, length].
        device: Where the model lies.
    """
    return [one.after for one in _passed(model, (), _ids(tokens, device), {}, device)]


@contextmanager
def one_block(model: Any, index: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let one block run alone within the context; yield its function, through which gradients flow.

    Args:
        model: A float32 model. The function maps the block's input, [1, length, width], to its output.
        index: Index of the block.
    """
    here = local()

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        here.after = inputs[0]

    def run(states: Tensor) -> Tensor:
        """Return the states of one sequence behind the block."""
        model.base_model(inputs_embeds=states, use_cache=False)
        after: Tensor = here.after
        return after

    norm = model.base_model.get_submodule(names_of(model.config.model_type).final_norm)
    with ExitStack() as hooks:
        hooks.callback(norm.register_forward_pre_hook(see).remove)
        hooks.enter_context(only_blocks(model, (index,)))
        yield run


class Passed(NamedTuple):
    """A sequence after a block.

    Attributes:
        after: States, [1, length, width].
        seen: Inputs of the watched modules of the block by name, each [length, in].
    """

    after: Tensor
    seen: Mapping[str, Tensor]


def second_moments(rows: Sequence[Tensor]) -> Tensor:
    """Return the mean product of each pair of columns, float64 [in, in].

    Args:
        rows: One matrix for each sequence, float32 [length, in].
    """
    joined = torch.cat(list(rows))
    columns = joined.shape[1]
    found = torch.empty(columns, columns, dtype=torch.float64, device=joined.device)
    # The result is symmetric, so only the blocks on the diagonal and above it are computed.
    step = -(-columns // _PARTS)
    for start in range(0, columns, step):
        part, behind = slice(start, start + step), slice(start + step, None)
        own = joined[:, part].T @ joined[:, part]
        found[part, part] = (own + own.T) / 2
        found[part, behind] = joined[:, part].T @ joined[:, behind]
        found[behind, part] = found[part, behind].T
    return found / len(joined)


_PARTS = 4


def through_block(
    model: Any,
    index: int,
    states: Sequence[Tensor],
    watched: Sequence[str] = (),
    device: str = "cpu",
    *,
    bf16: bool = False,
) -> Iterator[Passed]:
    """Run sequences through one block, one after another.

    Args:
        model: A float32 model on `device`.
        index: Index of the block.
        states: The block's input for each sequence.
        watched: Names of modules in the block whose inputs are returned.
        device: Where the model lies.
        bf16: Whether products are computed in bfloat16; states stay in float32.
    """
    modules = {name: decoder_layers(model)[index].get_submodule(name) for name in watched}
    yield from _passed(model, (index,), [{"inputs_embeds": one} for one in states], modules, device, bf16)


def up_to_block(
    model: Any,
    index: int,
    tokens: npt.NDArray[Any],
    watched: Sequence[str] = (),
    device: str = "cpu",
    *,
    bf16: bool = False,
) -> Iterator[Passed]:
    """Run sequences through a block and all before it, one after another: also where no block runs alone.

    Args:
        model, index, watched, device, bf16: As for `through_block`.
        tokens: [sequences, length].
    """
    modules = {name: decoder_layers(model)[index].get_submodule(name) for name in watched}
    yield from _passed(model, range(index + 1), _ids(tokens, device), modules, device, bf16)


def _ids(tokens: npt.NDArray[Any], device: str) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.from_numpy(one.astype(np.int64))[None].to(device)} for one in tokens]


def _passed(
    model: Any,
    kept: Collection[int],
    begun: Sequence[dict[str, Tensor]],
    watched: Mapping[str, nn.Module],
    device: str,
    bf16: bool = False,
) -> Iterator[Passed]:
    here = local()

    def end(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        here.after = inputs[0]

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        here.seen[name] = inputs[0][0].float()

    def run(index: int) -> Passed:
        """Return the states of one sequence behind the blocks, and the inputs of watched modules."""
        here.seen = {}
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            model.base_model(**begun[index], use_cache=False)
        return Passed(here.after, here.seen)

    norm = model.base_model.get_submodule(names_of(model.config.model_type).final_norm)
    with ExitStack() as hooks:
        hooks.callback(norm.register_forward_pre_hook(end).remove)
        for name, module in watched.items():
            hooks.callback(module.register_forward_pre_hook(partial(see, name)).remove)
        hooks.enter_context(only_blocks(model, kept))
        yield from map_sequences(run, len(begun), device)
