"""Provides a step's teacher targets: from the cache (with or without the head), the live teacher, or the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodistill.data.conversations import Likeliest
from autodistill.distillation.losses.targets import FullTarget, Target, WrittenTarget
from autodistill.distillation.teacher.output_cache import TeacherCache
from autodistill.errors import InputError
from autodistill.inference.half_precision import load_held
from autodistill.models.layer_widths import cap_of
from autodistill.models.loading import load_head, load_model, watched_layers
from autodistill.models.model_folder import HeldType, read_config
from autodistill.strategy.recipe import Distillation


class LiveTeacher:
    """A teacher that is loaded when a trial first needs it, and then stays with its worker.

    Args:
        folder: Its transformers folder.
        device: Where it runs.
        bf16: Whether it stores weights and computes products in bfloat16 instead of float32.
        held_type: Type that its matrices are stored in if it computes in float32.
    """

    def __init__(self, folder: Path, device: str = "cpu", bf16: bool = False, held_type: HeldType = "float32") -> None:
        self._folder, self._device, self._held = folder, device, held_type
        self._type = torch.bfloat16 if bf16 else torch.float32
        self._last: tuple[Tensor, Mapping[int | str, Tensor]] | None = None

    @cached_property
    def _model(self) -> Any:
        if self._type == torch.bfloat16:
            model = load_model(self._folder, self._type, self._device)
        else:
            model = load_held(self._folder, self._held, self._device)
        return model.requires_grad_(False)

    @cached_property
    def head(self) -> Tensor:
        """The output head, [vocab, width]. If the model is not loaded, only the head is read."""
        model = self.__dict__.get("_model")
        weight: Tensor = load_head(self._folder) if model is None else model.get_output_embeddings().weight.detach()
        return weight.to(self._device, self._type)

    @cached_property
    def _cap(self) -> float | None:
        return cap_of(read_config(self._folder))

    def target(self, states: Tensor, temperature: float, *, standardized: bool = False) -> FullTarget:
        """Return the targets that the head computes from last hidden states, [n, width]."""
        return FullTarget(
            states=states, head=self.head, temperature=temperature, standardized=standardized, cap=self._cap
        )

    def final(self, ids: Tensor) -> Tensor:
        """Return the last hidden states after the final norm, [sequences * (length - 1), width].

        Args:
            ids: int64 [sequences, length].
        """
        return self.read(ids, ())["final"]

    def state(self, ids: Tensor, layer: int, layers: Sequence[int]) -> Tensor:
        """Return the output of one layer, float32 [sequences * (length - 1), width].

        Args:
            ids: int64 [sequences, length].
            layer: Index of the layer.
            layers: All layers that are needed for these sequences, so that one pass provides them.
        """
        return self.read(ids, layers)[layer].float()

    def read(self, ids: Tensor, layers: Sequence[int]) -> Mapping[int | str, Tensor]:
        """Return the last hidden states and those of layers. If the last pass read the same ids, it is used again."""
        before = self._last
        if before is not None and before[0].equal(ids) and all(layer in before[1] for layer in layers):
            return before[1]
        found: dict[int | str, Tensor] = {}

        def keep(name: int | str, states: Tensor) -> None:
            found[name] = states[:, :-1].flatten(0, 1)

        with torch.no_grad(), watched_layers(self._model, layers, keep):
            keep("final", self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        self._last = ids, found
        return found


def check_logprobs(recipes: Iterable[Distillation], reported: bool) -> None:
    """Check that the data have log-probabilities if a recipe learns from them.

    Args:
        recipes: The recipes of a strategy or a space.
        reported: Whether any training answer has its writer's log-probabilities.

    Raises:
        InputError: A recipe needs them and the data have none. The message says how to get them.
    """
    if not reported and any(recipe.weighs_teacher and recipe.signal == "written" for recipe in recipes):
        raise InputError(
            'the signal "written" needs answers with their writer\'s log-probabilities, and these data have none of '
            "this teacher's tokens: give what `autodistill write --endpoint ... --top-k ...` wrote with this --teacher "
            "to a file of its own"
        )


def target_source(
    recipe: Distillation,
    cache: TeacherCache | None,
    teacher: LiveTeacher | None,
    writer_logprobs: Likeliest | None = None,
) -> Callable[[list[int], Tensor, float], Target]:
    """Return a function that returns teacher targets.

    Its arguments are sequence indices, the sequences' tokens as the teacher reads them, int64 [sequences, length], and
    a temperature.

    Args:
        recipe: The recipe, which names the signal.
        cache: The cache with the outputs that the signal needs, or None if it needs no cache.
        teacher: The loaded teacher, for the signals "states" and "online".
        writer_logprobs: The data's log-probabilities, for the signal "written".
    """

    def target(indices: list[int], ids: Tensor, temperature: float) -> Target:
        """Return the target of the sequences `indices`, whose tokens are `ids`, at a temperature."""
        if recipe.signal == "online":
            assert teacher is not None
            return teacher.target(teacher.final(ids), temperature, standardized=recipe.standardise)
        if recipe.signal == "written":
            assert writer_logprobs is not None
            # A place lists the candidates for its own token. Position i predicts token i + 1, so the first place is
            # dropped.
            found, log_p = (torch.from_numpy(part[indices, 1:].reshape(-1, part.shape[-1])) for part in writer_logprobs)
            return WrittenTarget(ids=found.long(), log_p=log_p).to(str(ids.device))
        assert cache is not None
        if recipe.signal == "states":
            assert teacher is not None
            states = cache.final(indices).to(ids.device)
            return teacher.target(states, temperature, standardized=recipe.standardise)
        if recipe.signal == "sampled":
            return cache.sampled(indices, temperature, recipe.signal_tokens).to(str(ids.device))
        return cache.top(indices, temperature, recipe.signal_tokens).to(str(ids.device))

    return target
