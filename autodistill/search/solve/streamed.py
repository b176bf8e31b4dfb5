"""Scores and measures a teacher that is larger than memory, with the weights of one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from torch import Tensor

from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.evaluation.base import Scoring
from autodistill.inference.blocks import embedded, only_blocks, through_block
from autodistill.inference.blocks_on_disk import BlocksOnDisk
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.inference.scoring import score
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales, Storage
from autodistill.search.solve.bench import Bench, Measured, Sample, compute_device, measured, own_scales
from autodistill.strategy.deployment import Deployment


class StreamedBench(Bench):
    """A bench that holds the teacher's table, head and norms, and only the block that computes.

    All sequences go through a block before the next block is read. So a text needs one reading of the files, and
    gradients need two. The results are those of a `Bench`.

    Args:
        weights: The teacher's weights, on `device`.
        spec, own, device, scoring: As for `Bench`.
    """

    def __init__(
        self,
        weights: BlocksOnDisk,
        spec: ModelSpec,
        own: Mapping[str, tuple[Storage, Scales]],
        device: str,
        scoring: Scoring = "float32",
    ) -> None:
        super().__init__(weights.model, spec, own, device, keep=False, scoring=scoring)
        self._weights = weights
        self._in_blocks: dict[str, Storage] = {}  # storages of the tensors inside blocks

    @contextmanager
    def shown(self, storages: Mapping[str, Storage]) -> Iterator[None]:
        """Within the context, the model computes with the given tensors as stored, and otherwise with its own."""
        inside = self._weights.in_blocks
        self._in_blocks = {name: storage for name, storage in storages.items() if name in inside}
        with super().shown({name: storage for name, storage in storages.items() if name not in inside}):
            yield

    @property
    def reads_together(self) -> bool:
        """Whether two texts are read at once: on a GPU, where reading and rounding a block take longer than a text."""
        return self.device != "cpu"

    def measure_all(self, deployment: Deployment, *samples: Sample) -> tuple[Measured, ...]:
        """Return what a `Bench` does. The samples are read together, so that each block is read and rounded once."""
        storages = {tensor.name: deployment.storage(tensor) for tensor in self.spec.tensors}
        with self.shown(storages), quantized_cache(self.model, deployment.cache_types):
            if deployment.cache_types == ("f16", "f16") and self._is_itself():
                return tuple(sample.teacher for sample in samples)
            found = []
            with self.scored(), self._reading([sample.data for sample in samples]) as begun:
                for sample, states in zip(samples, begun, strict=True):
                    scores, _ = score(self.model, sample.data, sample.reference, device=self.device, begun=states)
                    found.append(measured(scores))
            return tuple(found)

    def replaced(self, weights: Iterable[tuple[str, Tensor]]) -> NoReturn:
        """Never called: requests that need the whole model in memory are refused before anything is loaded."""
        raise NotImplementedError("a model that is read by block has no place for other weights")

    def _is_itself(self) -> bool:
        return not self._in_blocks and super()._is_itself()

    @contextmanager
    def _block(self, index: int) -> Iterator[list[str]]:
        """Within the context, a block has its weights as they are stored. Yields their names."""
        with self._weights.block(index) as names:
            for name in names:
                if name in self._in_blocks:
                    self._parameters[name].data = self.stored(name, self._in_blocks[name])
            yield names

    @contextmanager
    def reading(self, data: TokenSet) -> Iterator[Sequence[Tensor] | None]:
        """Within the context, text is scored from the states behind the last block, which are yielded."""
        with self._reading([data]) as (states,):
            yield states

    @contextmanager
    def _reading(self, texts: Sequence[TokenSet]) -> Iterator[list[list[Tensor]]]:
        """Within the context, texts are scored from their states behind the last block, which are yielded."""
        states = [embedded(self.model, data.tokens, self.device) for data in texts]
        for index in range(self.spec.layers):
            with self._block(index):
                states = [
                    [one.after for one in through_block(self.model, index, before, device=self.device)]
                    for before in states
                ]
        with only_blocks(self.model, ()):
            yield states


def load_streamed(
    teacher: Teacher, spec: ModelSpec, own: Deployment | None, scoring: Scoring = "float32"
) -> StreamedBench:
    """Load a teacher with one block in memory at a time.

    Args:
        teacher, spec, own, scoring: As for `load_bench`.
    """
    device = compute_device()
    return StreamedBench(BlocksOnDisk(teacher.folder, device), spec, own_scales(teacher, spec, own), device, scoring)
