"""Trains one student on a teacher's cached outputs: a generator of step records that can stop and continue anywhere."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autodistill.contracts import Plan
from autodistill.data import TokenSet
from autodistill.distillation.alignment import Pair, alignment_loss, layer_map, projection
from autodistill.distillation.divergence import logit_loss
from autodistill.distillation.quantization import deploy_tensor, quantized_training
from autodistill.distillation.student import decoder_layers
from autodistill.distillation.teacher_cache import TeacherCache
from autodistill.distillation.temperature import snap, temperature_at
from autodistill.errors import TrialFailedError
from autodistill.formats import Grid
from autodistill.strategy import Strategy

_CLIP = 1.0
_BETAS = (0.9, 0.95)
# A loss that is not finite spoils its step alone; this many in a row end the trial.
_PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step.

    Attributes:
        tokens: Trained on so far, this step included.
        loss, divergence, cross_entropy, alignment: Means over the step's predicted tokens; `loss` is what was
            descended, the others are its terms without their weights.
        temperature: Of the divergence, as snapped.
        learning_rate: Of the student.
        gradient_norm: Before clipping.
        tokens_per_second: Of this step.
    """

    tokens: int
    loss: float
    divergence: float
    cross_entropy: float
    alignment: float
    temperature: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float


def stable_rate(peak: float, tokens: int, warmup: int) -> float:
    """Learning rate of the warm-up and stable part for the step that ends after `tokens`, above 0."""
    return peak * min(1.0, tokens / max(warmup, 1))


def decayed(tokens: int, start: int, end: int) -> float:
    """Factor of the decay branch for the step that begins after `tokens`, falling linearly from 1 at `start` to 0."""
    return (end - tokens) / (end - start)


def branch_point(target: int, decay: float, batch_tokens: int) -> int:
    """Tokens, in whole steps, at which the decay of a run to `target` tokens begins; one step at least decays."""
    steps = target // batch_tokens
    return (steps - max(1, round(steps * decay))) * batch_tokens


class Trainer:
    """Holds a student, its optimiser and its place in the schedule.

    The schedule is a function of absolute tokens: warm-up and stable rate are common to every target, and a target is
    reached by a decay that branches off the stable part. Training goes on from a checkpoint taken at the branch.

    Args:
        model: The student, in float32 on `device`.
        kept: Teacher layer of each student layer.
        teacher_layers, teacher_width: The teacher's.
        strategy: What is trained.
        plan: Batch, warm-up, horizon and precision.
        data: Training sequences, in the cache's order. Where they say which tokens are answers, those alone are
            learnt, and the head is computed for them alone.
        cache: The teacher's outputs for them.
        seed: Of data order and projections.
        device: Where the student lies.
    """

    def __init__(
        self,
        model: Any,
        *,
        kept: tuple[int, ...],
        teacher_layers: int,
        teacher_width: int,
        strategy: Strategy,
        plan: Plan,
        data: TokenSet,
        cache: TeacherCache,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.tokens = 0
        self._strategy = strategy
        self._recipe = strategy.distillation
        self._plan = plan
        self._data = data
        self._cache = cache
        self._seed = seed
        self._device = device
        self._failures = 0
        self._frozen_head: Tensor | None = None
        model.get_input_embeddings().weight.requires_grad_(self._recipe.train_embeddings)
        alignment = self._recipe.alignment
        self._pairs: tuple[Pair, ...] = layer_map(alignment, kept, teacher_layers) if alignment else ()
        width = model.config.hidden_size
        self._projections = nn.ModuleList(
            projection(alignment, width, teacher_width, seed + index) for index in range(len(self._pairs)) if alignment
        ).to(device)
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "factor": 1.0}]
        if alignment and list(self._projections.parameters()):
            groups.append({"params": list(self._projections.parameters()), "factor": alignment.projection_rate})
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=0.0, fused=True)

    def train_stable(self, until: int) -> Iterator[StepRecord]:
        """Trains at the warm-up's or stable rate until `until` tokens, a whole number of steps."""
        yield from self._train(until, self._stable_rate, None)

    def train_decay(self, until: int, storage_of: Callable[[str], Grid | None] | None = None) -> Iterator[StepRecord]:
        """Trains with the rate falling to zero at `until`, on the finishing stage's grid where there is one.

        Args:
            until: Tokens at the end, a whole number of steps.
            storage_of: The grid of each weight by name, or None for a plain decay.
        """
        start = self.tokens

        def rate(tokens: int) -> float:
            return self._stable_rate(tokens) * decayed(tokens, start, until)

        with ExitStack() as stack:
            if storage_of is not None:
                stack.enter_context(quantized_training(self.model, storage_of))
            yield from self._train(until, rate, storage_of)

    def _stable_rate(self, tokens: int) -> float:
        after = tokens + self._plan.batch_tokens
        return stable_rate(self._recipe.learning_rate, after, self._plan.warmup_tokens)

    def _train(
        self, until: int, rate: Callable[[int], float], storage_of: Callable[[str], Grid | None] | None
    ) -> Iterator[StepRecord]:
        self.model.train()
        self._frozen_head = self._cast_head(storage_of)
        while self.tokens < until:
            yield self._step(rate(self.tokens))

    def _cast_head(self, storage_of: Callable[[str], Grid | None] | None) -> Tensor | None:
        """A frozen head as bfloat16 training sees it, cast once and not in every step; None where it is trained."""
        weight = self.model.lm_head.weight
        if weight.requires_grad or not self._plan.bf16:
            return None
        name = next(name for name, parameter in self.model.named_parameters() if parameter is weight)
        grid = storage_of(name) if storage_of else None
        return (weight.detach() if grid is None else deploy_tensor(weight, grid)).bfloat16()

    def _sequences(self) -> list[int]:
        """Indices of the next step's sequences: a fresh order for each pass over the data, a function of the seed."""
        total = len(self._data.tokens)
        first = self.tokens // self._plan.sequence_length
        count = self._plan.batch_tokens // self._plan.sequence_length
        orders: dict[int, Any] = {}
        indices = []
        for position in range(first, first + count):
            epoch, offset = divmod(position, total)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((self._seed, epoch)).permutation(total)
            indices.append(int(orders[epoch][offset]))
        return indices

    def _step(self, rate: float) -> StepRecord:
        began = time.perf_counter()
        temperature = snap(temperature_at(self._recipe.temperature, self.tokens, self._plan.tokens))
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        loss, terms = self._loss(self._sequences(), temperature)
        loss.backward()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = _clip(parameters)
        if math.isfinite(norm) and math.isfinite(terms["loss"]):
            self._optimizer.step()
            self._failures = 0
        else:
            self._failures += 1
        self._optimizer.zero_grad(set_to_none=True)
        self.tokens += self._plan.batch_tokens
        if self._failures >= _PATIENCE:
            raise TrialFailedError("nan", f"loss or gradient was not finite in {_PATIENCE} steps in a row")
        return StepRecord(
            tokens=self.tokens,
            temperature=temperature,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=self._plan.batch_tokens / (time.perf_counter() - began),
            **terms,
        )

    def _loss(self, indices: list[int], temperature: float) -> tuple[Tensor, dict[str, float]]:
        ids = torch.from_numpy(np.asarray(self._data.tokens[indices], dtype=np.int64)).to(self._device)
        counted = self._counted(indices)
        states: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for pair in self._pairs:
                layer = decoder_layers(self.model)[pair.student_layer]
                handle = layer.register_forward_hook(_capture(states, pair.student_layer))
                stack.callback(handle.remove)
            with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._plan.bf16):
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
                # As a matrix: for a slice of three dimensions the product would copy the whole head.
                rows = hidden[:, :-1].flatten(0, 1)[counted]
                head = self._frozen_head
                logits = self.model.lm_head(rows) if head is None else nn.functional.linear(rows, head)
                projected = [
                    project(states[pair.student_layer][:, :-1].flatten(0, 1)[counted])
                    for pair, project in zip(self._pairs, self._projections, strict=True)
                ]
        weight = self._recipe.divergence_weight
        target = None
        if weight > 0:
            cached = self._cache.target(indices, temperature)
            target = cached._replace(
                ids=cached.ids[counted].to(self._device),
                logits=cached.logits[counted].to(self._device),
                logsumexp=cached.logsumexp[counted].to(self._device),
            )
        logit_terms = logit_loss(logits, ids[:, 1:].flatten()[counted], target, weight)
        loss = logit_terms.total
        aligned = torch.zeros((), device=self._device)
        if self._pairs:
            losses = [
                alignment_loss(state, self._cache.state(indices, pair.teacher_state)[counted].to(self._device))
                for pair, state in zip(self._pairs, projected, strict=True)
            ]
            aligned = torch.stack(losses).mean()
            assert self._recipe.alignment is not None
            loss = loss + self._recipe.alignment.weight * aligned
        values = {
            "loss": loss,
            "divergence": logit_terms.divergence,
            "cross_entropy": logit_terms.cross_entropy,
            "alignment": aligned,
        }
        return loss, {name: float(value.detach()) for name, value in values.items()}

    def _counted(self, indices: list[int]) -> Tensor | slice:
        """The rows that losses are averaged over: answers, where the data say which tokens are; else all of them."""
        if self._data.answers is None:
            return slice(None)
        return torch.from_numpy(np.flatnonzero(self._data.answers[indices, 1:]))

    def save(self, path: Path) -> None:
        """Writes the trained weights, the optimiser and the place in the schedule, whole or not at all.

        Frozen weights are not written: they are the teacher's, and the student is built from it before `load`.
        """
        tensors = {f"weight.{name}": p.detach() for name, p in self._trained()}
        for name, parameter in self._trained():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        temporary = path.with_name(f".{path.name}.partial")
        metadata = {"tokens": str(self.tokens), "strategy": self._strategy.stable_id, "seed": str(self._seed)}
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Continues from what `save` wrote, to the last bit on the CPU.

        Raises:
            TrialFailedError: The checkpoint is of other stages or of another seed.
        """
        with safe_open(path, framework="pt", device=self._device) as file:
            metadata = file.metadata()
            if (metadata["strategy"], metadata["seed"]) != (self._strategy.stable_id, str(self._seed)):
                raise TrialFailedError("error", f"{path.name} is a checkpoint of other stages or of another seed")
            names = set(file.keys())
            for name, parameter in self._trained():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in names]
                self._optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        self.tokens = int(metadata["tokens"])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = [(f"student.{name}", p) for name, p in self.model.named_parameters() if p.requires_grad]
        return named + [(f"projection.{name}", p) for name, p in self._projections.named_parameters()]


def _clip(parameters: list[nn.Parameter]) -> float:
    """Scales the gradients to a norm of `_CLIP` together, where it is above, and gives the norm they had."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm > _CLIP:
        torch.nn.utils.clip_grads_with_norm_(parameters, _CLIP, norm)
    return float(norm)


def _capture(states: dict[int, Tensor], index: int) -> Callable[..., None]:
    def hook(module: Any, arguments: Any, output: Any) -> None:
        states[index] = output[0] if isinstance(output, tuple) else output

    return hook


def read_tokens(path: Path) -> int:
    """Tokens trained on in a checkpoint, read from its header alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["tokens"])
