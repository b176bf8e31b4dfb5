"""A teacher that is larger than memory: scored and measured with the weights of one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.inference.batching import map_sequences
from autodistill.inference.blocks import embedded, one_block, only_blocks, through_block
from autodistill.inference.blocks_on_disk import BlocksOnDisk
from autodistill.inference.watching import Taken, chances_of, of_drawn_tokens, watched
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales, Storage
from autodistill.search.solve.bench import Bench, compute_device, own_scales
from autodistill.strategy.deployment import Deployment


class StreamedBench(Bench):
    """Shows a teacher as a deployment stores it, and holds its table, head and norms, and a block while it computes.

    All sequences go through a block before the next one is read, so that a text costs one reading of the files, and
    gradients two. What is computed is what a `Bench` computes.

    Args:
        weights: The teacher's, on `device`.
        spec, own, device: As for `Bench`.
    """

    def __init__(
        self, weights: BlocksOnDisk, spec: ModelSpec, own: Mapping[str, tuple[Storage, Scales]], device: str
    ) -> None:
        super().__init__(weights.model, spec, own, device)
        self._weights = weights
        self._in_blocks: dict[str, Storage] = {}  # how what is in blocks is shown

    @contextmanager
    def shown(self, storages: Mapping[str, Storage]) -> Iterator[None]:
        """Within the context the model computes with those tensors as they are stored, and with its own others."""
        inside = self._weights.in_blocks
        self._in_blocks = {name: storage for name, storage in storages.items() if name in inside}
        with super().shown({name: storage for name, storage in storages.items() if name not in inside}):
            yield

    def replaced(self, weights: Iterable[tuple[str, Tensor]]) -> NoReturn:
        """Never called: what needs the whole model in memory is refused before anything is loaded."""
        raise NotImplementedError("a model that is read by block has no place for other weights")

    def _is_itself(self) -> bool:
        return not self._in_blocks and super()._is_itself()

    @contextmanager
    def _block(self, index: int) -> Iterator[list[str]]:
        """Within the context a block has its weights, as they are shown."""
        with self._weights.block(index) as names:
            for name in names:
                if name in self._in_blocks:
                    self._parameters[name].data = self.stored(name, self._in_blocks[name])
            yield names

    def _through(self, index: int, states: Sequence[Tensor]) -> list[Tensor]:
        with self._block(index):
            return [one.after for one in through_block(self.model, index, states, device=self.device)]

    @contextmanager
    def reading(self, data: TokenSet) -> Iterator[Sequence[Tensor] | None]:
        """Within the context text is scored as the model shows it, from the states behind the last block."""
        states = embedded(self.model, data.tokens, self.device)
        for index in range(self.spec.layers):
            states = self._through(index, states)
        with only_blocks(self.model, ()):
            yield states

    def watched(self, names: Sequence[str], tokens: Tensor, seed: int) -> Iterator[dict[str, list[Taken]]]:
        """What goes into matrices and the gradients behind them, as a `Bench` gives it: block by block, the last first.

        The states before each block are kept, and each block is computed once more from them.
        """
        chances, wanted = chances_of(tokens, seed), set(names)
        with self.shown({}):
            given = [embedded(self.model, tokens.numpy(), self.device)]
            for index in range(self.spec.layers):
                given.append(self._through(index, given[-1]))
            slopes = self._behind(given.pop(), chances)
            for index in reversed(range(self.spec.layers)):
                with self._block(index) as inside:
                    part = [name for name in inside if name in wanted]
                    found, slopes = self._back(index, part, given.pop(), slopes)
                    yield {name: [one.pop(name, []) for one in found] for name in part}

    def _behind(self, states: Sequence[Tensor], chances: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the log-probability of drawn tokens behind the last block, by sequence."""

        def slope(index: int) -> Tensor:
            leaf = states[index].clone().requires_grad_()
            with torch.enable_grad():
                last = self.model.base_model(inputs_embeds=leaf, use_cache=False).last_hidden_state
                last.backward(of_drawn_tokens(self.model, last.detach()[0], chances[index])[None])
            assert leaf.grad is not None
            return leaf.grad

        with only_blocks(self.model, ()):
            return list(map_sequences(slope, len(states), self.device))

    def _back(
        self, index: int, names: Sequence[str], given: Sequence[Tensor], slopes: Sequence[Tensor]
    ) -> tuple[list[dict[str, Taken]], list[Tensor]]:
        """What is watched in a block, and the gradients before it.

        Args:
            index: Of the block.
            names: Of its matrices.
            given: What it is given, of each sequence.
            slopes: The gradients behind it.
        """
        leaves = [one.clone().requires_grad_() for one in given]
        with one_block(self.model, index) as run:
            found = watched(
                self.model,
                names,
                lambda sequence: (run(leaves[sequence]), lambda: slopes[sequence]),
                len(leaves),
                self.device,
            )
        before = [leaf.grad for leaf in leaves]
        assert all(one is not None for one in before)
        return found, [one for one in before if one is not None]


def load_streamed(teacher: Teacher, spec: ModelSpec, own: Deployment | None) -> StreamedBench:
    """A teacher of which one block is in memory at a time.

    Args:
        teacher, spec, own: As for `load_bench`.
    """
    device = compute_device()
    return StreamedBench(BlocksOnDisk(teacher.folder, device), spec, own_scales(teacher, spec, own), device)
