"""Computes the gradients of one step in micro-batches, in one process or several, with balanced terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autodistill.distillation.losses.hidden_states import balance_factor
from autodistill.distillation.training.fake_quantize import FakeQuantized, one_step
from autodistill.distillation.training.fsdp import Sharding
from autodistill.distillation.training.on_policy import Written
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.side_by_side import SideBySide
from autodistill.distillation.training.step_loss import TERMS, Sizes, StepLoss, Weighing
from autodistill.inference.torch_memory import StepOutOfMemory, give_back_memory, is_out_of_memory
from autodistill.strategy.recipe import Distillation


class Gradients:
    """Accumulates a step's gradients in the parameters, and returns the means of its terms.

    Args:
        loss: Computes the loss of some sequences.
        recipe: Which terms there are, and which are balanced.
        plan: The micro-batch, and whether activations are computed again.
        parameters: Returns all parameters that the optimiser updates.
        whole: Returns the parameters that every process holds whole.
        sharding: The processes that train together, or None.
        side_by_side: Number of processes (this one and its forks) that share the sequences.

    Attributes:
        micro_batch: Sequences of one forward and backward pass. It shrinks when memory runs out.
        balance: Factors that scale alignment and attention to the size of the logit loss, from the previous step.
        on_grid: Weights that lie on a grid, by name.
        beside: The forks, if there are any.
    """

    def __init__(
        self,
        loss: StepLoss,
        recipe: Distillation,
        plan: Plan,
        *,
        parameters: Callable[[], list[nn.Parameter]],
        whole: Callable[[], list[nn.Parameter]],
        sharding: Sharding | None,
        side_by_side: int,
    ) -> None:
        self.micro_batch = plan.micro_batch
        self.balance: tuple[float, float] | None = None
        self.on_grid: Mapping[str, FakeQuantized] = {}
        self.beside: SideBySide | None = None
        self._loss = loss
        self._recipe = recipe
        self._checkpointing = plan.checkpointing
        self._parameters = parameters
        self._whole = whole
        self._sharding = sharding
        self._side_by_side = side_by_side

    def of_step(self, indices: list[int], at: Weighing, step: Sizes, written: Written | None) -> dict[str, float]:
        """Compute the gradients of a whole step and the means of its terms, one micro-batch at a time.

        When memory runs out, the step begins again with half the micro-batch. The effective batch stays the same.

        Raises:
            StepOutOfMemory: Memory ran out in one of several processes, which must all begin again.
        """
        processes = 1 if self._sharding is None else self._sharding.count
        while True:
            try:
                return self._in_all_processes(indices, self._with_balance(indices, at, step), step, written)
            except (RuntimeError, MemoryError) as error:
                fewer = min(self.micro_batch, len(indices) // processes) // 2
                if not is_out_of_memory(error) or fewer == 0:
                    raise
                if self._sharding is not None:
                    raise StepOutOfMemory(fewer) from error
            # Outside the handler, because its traceback keeps the tensors of the failed pass alive.
            for parameter in self._parameters():
                parameter.grad = None
            self.micro_batch = fewer
            give_back_memory()

    def _in_all_processes(
        self, indices: list[int], at: Weighing, step: Sizes, written: Written | None
    ) -> dict[str, float]:
        """Add up the step's gradients and means. Each process computes a share of them."""
        if self._side_by_side == 1:
            return self._accumulate(indices, at, step)
        threads = torch.get_num_threads()
        each_threads = max(1, threads // self._side_by_side)
        if self.beside is None:
            self.beside = SideBySide(self._serve_request, self._parameters(), self._side_by_side - 1, each_threads)
        each = -(-len(indices) // self._side_by_side)
        mine, *others = (indices[start : start + each] for start in range(0, len(indices), each))
        torch.set_num_threads(each_threads)
        try:
            self.beside.ask(*((part, at, step, self.micro_batch, written) for part in others))
            found = [self._accumulate(mine, at, step), *self.beside.answers()]
        except BaseException:
            self.close()  # their pending answers belong to this step
            raise
        finally:
            torch.set_num_threads(threads)
        return {name: sum(one[name] for one in found) for name in TERMS}

    def _serve_request(
        self, indices: list[int], at: Weighing, step: Sizes, micro_batch: int, written: Written | None
    ) -> dict[str, float]:
        """Work on one request of the parent process. Runs in a fork."""
        self.micro_batch = micro_batch
        with self._loss.reading(written):
            return self._accumulate(indices, at, step)

    def _with_balance(self, indices: list[int], at: Weighing, step: Sizes) -> Weighing:
        """Return the weights with the balancing factors of the previous step, or of this step if it is the first.

        So the factors are known before any gradient, and do not depend on the size of the micro-batch.
        """
        if not self._balancing:
            return at
        if self.balance is None and step.learnt > 0:
            with torch.no_grad():
                self.balance = self._balanced(self._accumulate(indices, at, step))
        alignment, attention = self.balance or (1.0, 1.0)
        return at._replace(alignment=alignment, attention=attention)

    def balance_by(self, terms: Mapping[str, float]) -> None:
        """Compute the next step's balancing factors from this step's terms."""
        self.balance = self._balanced(terms) if self._balancing else None

    @property
    def _balancing(self) -> bool:
        return any(part is not None and part.balance for part in (self._recipe.alignment, self._recipe.attention))

    def _balanced(self, terms: Mapping[str, float]) -> tuple[float, float] | None:
        """Return factors that scale a step's alignment and attention to its logit loss. Unmeasured factors stay."""
        alignment, attention = self.balance or (1.0, 1.0)
        if not all(map(math.isfinite, terms.values())):
            return self.balance
        if self._recipe.alignment and self._recipe.alignment.balance and terms["shared"] > 0:
            alignment = balance_factor(terms["alignment"] / terms["shared"], terms["logits"])
        if self._recipe.attention and self._recipe.attention.balance:
            attention = balance_factor(terms["attention"], terms["logits"])
        return alignment, attention

    def _accumulate(self, indices: list[int], at: Weighing, step: Sizes) -> dict[str, float]:
        """Add up the micro-batches' parts of the step's means, and their gradients if enabled."""
        means = dict.fromkeys(TERMS, 0.0)
        if step.learnt + step.own == 0:
            return means
        found: list[Tensor] = []
        learning = torch.is_grad_enabled()
        sharding, processes = self._sharding, 1
        if sharding is not None:
            indices, processes = sharding.share(indices), sharding.count
        parts = [indices[start : start + self.micro_batch] for start in range(0, len(indices), self.micro_batch)]
        # Uncertain tokens are chosen with the head, a few rows at a time. Each call would quantise the head again.
        repeated = len(parts) > 1 or self._recipe.positions == "uncertain"
        # When memory is short, or weights are gathered for each pass, quantised weights are not kept between passes.
        kept = repeated and sharding is None and not self._checkpointing
        with one_step(self.on_grid.values() if kept else ()):
            for part in parts:
                if not any(self._loss.sizes(part)):
                    # Other processes may have tokens that count, and all processes must gather every block together.
                    if sharding is not None:
                        nothing = self._loss.zero_loss(part)
                        if learning:
                            nothing.backward()
                    continue
                loss, terms = self._loss.of(part, at, step)
                if learning:
                    # Gradients are averaged over processes, but the parts of a step must add up.
                    (loss * processes).backward()
                found.append(terms)
        # Read once per step: each read makes this process wait for the GPU, and then the GPU waits for work.
        for values in torch.stack(found).tolist() if found else []:
            for name, value in zip(TERMS, values, strict=True):
                means[name] += value
        if sharding is None:
            return means
        if learning:
            sharding.average(self._whole())
        return sharding.sum(means)

    def close(self) -> None:
        """End the forks that share this process's steps."""
        if self.beside is not None:
            self.beside.close()
            self.beside = None
