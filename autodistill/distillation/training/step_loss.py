"""The loss of a micro-batch: compares the student's outputs with the text, the teacher's outputs and its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autodistill.data.dataset import TokenSet
from autodistill.distillation.losses.attention import Heads, attention_loss, watch
from autodistill.distillation.losses.divergence import divergence_of
from autodistill.distillation.losses.hidden_states import Pair, alignment_loss, layer_map, projection, rms_normalize
from autodistill.distillation.losses.logits import logit_loss
from autodistill.distillation.losses.targets import Target
from autodistill.distillation.losses.token_selection import Learnt, learnt_tokens, uncertain_logits
from autodistill.distillation.teacher.target_sources import target_source
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.on_policy import Written
from autodistill.models.layer_widths import cap_of, capped
from autodistill.models.loading import watched_layers
from autodistill.quantization.grids import Grid
from autodistill.quantization.rounding import deploy_tensor
from autodistill.strategy.recipe import Attention, Distillation

RECORDED = ("loss", "divergence", "cross_entropy", "alignment", "attention", "on_policy")
"""Names of a step's loss and of its terms, which are recorded without their weights."""
TERMS = (*RECORDED, "logits", "heard", "shared")
"""`RECORDED`, the logit loss, the share of its tokens with a divergence, and the share of learned tokens with an
alignment."""


class Sizes(NamedTuple):
    """Token counts behind the means of a step: of the logit loss, alignment, attention and the student's own tokens."""

    logits: int
    learnt: int
    attended: int
    own: int

    @property
    def own_part(self) -> float:
        """The part of the student's own tokens in the loss, in which each counts as much as a token of the text."""
        return self.own / max(1, self.own + self.logits)


class Shares(NamedTuple):
    """The fractions of a step's `Sizes` that belong to some of its sequences."""

    logits: float
    learnt: float
    attended: float
    own: float


class Weighing(NamedTuple):
    """The scheduled values of a step's loss.

    Attributes:
        temperature: Temperature of the divergence.
        weight: Weight of the divergence, 0 to 1. Cross-entropy has the rest.
        mixture: Mixture of the divergence, for divergences that have one.
        alignment, attention: Factors that scale these losses to the size of the logit loss; 1 without balancing.
    """

    temperature: float
    weight: float
    mixture: float
    alignment: float = 1.0
    attention: float = 1.0


class StepLoss:
    """Computes the loss of some of a step's sequences, with its gradient and its terms.

    Args:
        model: The student, on `device`.
        recipe: What is learned.
        teaching: Its teacher. The stored outputs are those for `data`, in its order.
        data: Training sequences.
        seed: Seed of the projections.
        device: The student's device.
        bf16: Whether products are computed in bfloat16.
        sharded: Whether several processes hold the student's weights. The model's own call then gathers them.

    Attributes:
        projections: Projections of the aligned layers' states, trained with the student. Empty if no layers are
            aligned.
    """

    def __init__(
        self,
        model: Any,
        recipe: Distillation,
        *,
        teaching: Teaching,
        data: TokenSet,
        seed: int,
        device: str,
        bf16: bool,
        sharded: bool,
    ) -> None:
        self._model = model
        self._body = model if sharded else model.base_model
        self._recipe = recipe
        self._data = data
        self._cache = teaching.cache
        self._teacher_block = block = teaching.block
        self._target = target_source(recipe, teaching.cache, teaching.live, (data.teacher or data).writer_logprobs)
        self._device = device
        self._bf16 = bf16
        self._sharded = sharded
        self._cap = cap_of(model.config)
        self._frozen_head: Tensor | None = None
        self._own: npt.NDArray[np.bool_] | None = None
        alignment, width = recipe.alignment, model.config.hidden_size
        self._pairs: tuple[Pair, ...] = layer_map(alignment, teaching.kept_layers, teaching.layers) if alignment else ()
        # With the signal "online", everything that is read of the teacher comes from its own forward pass.
        self._teacher = teaching.live if recipe.signal == "online" else None
        followed = [block.layer - 1] if block else []
        self._layers = tuple({*(pair.teacher_state for pair in self._pairs), *followed})
        self.projections = nn.ModuleList(
            projection(alignment, width, teaching.width, seed + index) for index in range(len(self._pairs)) if alignment
        ).to(device)

    def hold_head(self, storage_of: Callable[[str], Grid | None] | None) -> None:
        """Prepare a frozen head for the next steps, on its grid if it has one."""
        self._frozen_head = self._cast_head(storage_of)

    def _cast_head(self, storage_of: Callable[[str], Grid | None] | None) -> Tensor | None:
        """Return a frozen head cast to bfloat16, or None if it is trained, sharded, or used in float32."""
        weight = self._model.get_output_embeddings().weight
        if weight.requires_grad or not self._bf16 or self._sharded:
            return None
        name = next(name for name, parameter in self._model.named_parameters() if parameter is weight)
        grid = storage_of(name) if storage_of else None
        return (weight.detach() if grid is None else deploy_tensor(weight, grid)).bfloat16()

    @contextmanager
    def reading(self, written: Written | None) -> Iterator[None]:
        """Within the context, indices refer to `written`, whose ends the student wrote. None changes nothing."""
        before = self._data, self._own
        if written is not None:
            self._data, self._own = written
        try:
            yield
        finally:
            self._data, self._own = before

    def sizes(self, indices: list[int]) -> Sizes:
        """Return the token counts for the means over some sequences, without a forward pass."""
        learnt, recipe = self._learnt(indices, "cpu"), self._recipe
        chosen = learnt.chosen(recipe.uncertain_share) if recipe.positions == "uncertain" else learnt.size
        own = 0 if self._own is None else int(self._own[indices].sum())
        if recipe.attention is None:
            return Sizes(chosen, learnt.size, 0, own)
        text = self._data.documents[indices, :-1] >= 0
        return Sizes(chosen, learnt.size, text.size if self._data.answers is None else int(text.sum()), own)

    def _learnt(self, indices: list[int], device: str) -> Learnt:
        """Return the predicted tokens that losses are averaged over. For plain text these are all tokens."""
        return learnt_tokens(self._data, indices, self._recipe.positions == "all", device)

    def of(self, indices: list[int], at: Weighing, step: Sizes) -> tuple[Tensor, Tensor]:
        """Return what some sequences add to the step's loss and terms, which are means over the step's tokens.

        Args:
            indices: Indices of the sequences.
            at: The step's scheduled values.
            step: Token counts of all the step's sequences.

        Returns:
            The loss, and float64 [`TERMS`] on the device, without a gradient.
        """
        ids, recipe = self._ids(indices), self._recipe
        learnt = self._learnt(indices, self._device)
        shares = Shares(*(own / max(1, all) for own, all in zip(self.sizes(indices), step, strict=True)))
        states: dict[int, Tensor] = {}
        with ExitStack() as stack:
            aligned_layers = [pair.student_layer for pair in self._pairs]
            stack.enter_context(watched_layers(self._model, aligned_layers, states.__setitem__))
            heads = stack.enter_context(watch(self._model, recipe.attention)) if recipe.attention else []
            with self.autocast():
                hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
                # Flattened to a matrix. With a slice of three dimensions, the product would copy the whole head.
                all_rows = hidden[:, :-1].flatten(0, 1)
                rows = all_rows[learnt.rows]
                head = self._model.get_output_embeddings() if self._frozen_head is None else self._frozen_logits
                chosen, logits = self._logits(rows, head, learnt)
                own_rows = self._own_rows(indices)
                own_logits = None if own_rows is None else head(all_rows[own_rows])
                projected = [
                    project(states[pair.student_layer][:, :-1].flatten(0, 1)[learnt.shared])
                    for pair, project in zip(self._pairs, self.projections, strict=True)
                ]
        labels, heard = ids[:, 1:].flatten()[learnt.rows], learnt.heard
        target = self._teacher_targets(indices, at.temperature).take(learnt.teachers) if at.weight > 0 else None
        if chosen is not None:
            known = chosen[chosen < heard]
            labels, heard, target = labels[chosen], len(known), target.take(known) if target else None
        divergence = divergence_of(recipe.divergence, at.mixture)
        logit_terms = logit_loss(logits, labels, target, at.weight, divergence, heard=heard)
        part = step.own_part
        loss = (1 - part) * shares.logits * logit_terms.total
        own = torch.zeros((), device=self._device)
        if own_rows is not None and own_logits is not None:
            own = self._own_loss(own_logits, ids[:, 1:].flatten()[own_rows], indices, own_rows, at.mixture)
            loss = loss + part * shares.own * own
        aligned, attended = (torch.zeros((), device=self._device) for _ in range(2))
        if alignment := recipe.alignment:
            aligned = self._alignment_loss(projected, indices, learnt, alignment.distance)
            loss = loss + shares.learnt * alignment.weight * at.alignment * aligned
        if attention := recipe.attention:
            attended = attention_loss(heads, self._teacher_heads(indices, attention), self._text(indices))
            loss = loss + shares.attended * attention.weight * at.attention * attended
        terms = [loss.detach().double()]
        for share, found in (
            (shares.logits, (logit_terms.divergence, logit_terms.cross_entropy)),
            (shares.learnt, (aligned,)),
            (shares.attended, (attended,)),
            (shares.own, (own,)),
            (shares.logits, (logit_terms.total, logit_terms.heard)),
        ):
            terms += [share * term.detach().double() for term in found]
        shared = shares.learnt * learnt.heard / max(1, learnt.size)
        return loss, torch.stack([*terms, torch.full_like(terms[0], shared)])

    def _logits(self, states: Tensor, head: Callable[[Tensor], Tensor], learnt: Learnt) -> tuple[Tensor | None, Tensor]:
        """Return the chosen tokens for the logit loss, or None for all, and their logits."""
        if self._recipe.positions != "uncertain" or len(states) == 0:
            return None, head(states)
        only_multiplies = None if self._cap else self._frozen_head
        return uncertain_logits(states, head, only_multiplies, self._recipe.uncertain_share, learnt.sequences)

    def _frozen_logits(self, states: Tensor) -> Tensor:
        """Return the logits [rows, vocab] that the frozen head makes of states [rows, width]."""
        assert self._frozen_head is not None
        return capped(nn.functional.linear(states, self._frozen_head), self._cap)

    def _own_rows(self, indices: list[int]) -> Tensor | None:
        """Return the places of the student's own tokens among the predicted tokens, or None if it writes none."""
        if self._own is None:
            return None
        return torch.from_numpy(np.flatnonzero(self._own[indices, 1:])).to(self._device)

    def _own_loss(self, logits: Tensor, labels: Tensor, indices: list[int], rows: Tensor, mixture: float) -> Tensor:
        """Return the mean divergence from the teacher at temperature 1, over tokens that the student wrote.

        It compares the whole distributions at each place. No gradient flows through the sampling of the earlier tokens
        (GKD, arXiv 2306.13649, section 3.1).

        Args:
            logits: [own, vocab], the student's logits.
            labels: int64 [own], the tokens.
            indices: Indices of the sequences.
            rows: int64 [own], places among the predicted tokens.
            mixture: Mixture of the other steps' divergence.
        """
        phase = self._recipe.on_policy
        assert phase is not None
        assert self._teacher is not None
        # All other teacher outputs come from this same forward pass.
        states = self._teacher.read(self._read(indices), self._layers)["final"][rows]
        target = self._teacher.target(states, 1.0)
        name = self._recipe.divergence if phase.divergence == "same" else phase.divergence
        return logit_loss(logits, labels, target, 1.0, divergence_of(name, mixture)).total

    def zero_loss(self, indices: list[int]) -> Tensor:
        """Return a loss of 0 that still uses every block and the head, so that all processes gather their weights."""
        with self.autocast():
            hidden = self._body(input_ids=self._ids(indices), use_cache=False).last_hidden_state
            logits: Tensor = self._model.get_output_embeddings()(hidden[:, :1])
        return 0.0 * logits.sum()

    def _text(self, indices: list[int]) -> Tensor | None:
        """Return which tokens are not padding, bool [sequences, tokens], or None if there is no padding."""
        if self._data.answers is None:
            return None
        return torch.from_numpy(self._data.documents[indices] >= 0).to(self._device)

    def _ids(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(self._data.tokens[indices], dtype=np.int64)).to(self._device)

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the student's computations."""
        return torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._bf16)

    def _alignment_loss(self, projected: list[Tensor], indices: list[int], learnt: Learnt, distance: str) -> Tensor:
        """Return the alignment loss of the projected student states, as a mean over layer pairs and learned tokens."""
        if learnt.heard == 0:
            return torch.stack([0.0 * states.sum() for states in projected]).sum()
        losses = []
        for pair, states in zip(self._pairs, projected, strict=True):
            target, size = self._teacher_state(indices, pair.teacher_state, sized=distance == "l2")
            losses.append(
                alignment_loss(states, target[learnt.teachers], None if size is None else size[learnt.teachers])
            )
        return torch.stack(losses).mean() * (learnt.heard / learnt.size)

    def _teacher_targets(self, indices: list[int], temperature: float) -> Target:
        """Return the teacher's targets for all predicted tokens of its rendering.

        The teacher's token that ends an answer is replaced by the student's.
        """
        read = self._read(indices)
        if self._teacher is not None:
            # One pass provides all teacher outputs of these sequences.
            self._teacher.read(read, self._layers)
        target = self._target(indices, read, temperature)
        return target.renamed(*self._data.ends) if self._data.teacher is not None and self._data.ends else target

    def _read(self, indices: list[int]) -> Tensor:
        """Return the tokens of some sequences in the teacher's rendering."""
        tokens = (self._data.teacher or self._data).tokens[indices]
        return torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(self._device)

    def _teacher_state(self, indices: list[int], layer: int, *, sized: bool) -> tuple[Tensor, Tensor | None]:
        """Return the normalised output of a teacher layer, [tokens, width], and its root mean squares, [tokens, 1].

        Both come from the cache, or from the teacher if it runs with the student. The root mean squares are None
        without `sized`.
        """
        if self._teacher is None:
            assert self._cache is not None
            size = self._cache.state_size(indices, layer).to(self._device) if sized else None
            return self._cache.state(indices, layer).to(self._device), size
        state = self._teacher.state(self._read(indices), layer, self._layers)
        return rms_normalize(state), state.square().mean(dim=1, keepdim=True).sqrt() if sized else None

    def _teacher_heads(self, indices: list[int], attention: Attention) -> list[Heads]:
        """Return the teacher's attention heads to compare with, computed from the input of its layer."""
        assert self._teacher_block is not None
        states, sizes = self._teacher_state(indices, self._teacher_block.layer - 1, sized=True)
        assert sizes is not None
        states = (states.float() * sizes).unflatten(0, (len(indices), -1))
        with self.autocast():
            return self._teacher_block.heads(states, attention)
