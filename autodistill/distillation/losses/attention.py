"""Attention alignment: compares the student's attention with the teacher's, by attention maps or by relations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autodistill.errors import InputError
from autodistill.models.families import WHOLE_FAMILIES, Axis, get_family
from autodistill.models.loading import attention_forward, decoder_layers, register
from autodistill.models.spec import ModelSpec
from autodistill.strategy.recipe import Attention

# Entries of attention matrices per chunk, in float32: a buffer of 4 MB on a CPU, and of 128 MB elsewhere.
_CPU_CHUNK, _CHUNK = 2**20, 2**25
# Masked products get this value. A softmax makes it 0, but unlike infinity its differences are finite.
_HIDDEN = -1e30
_WATCHED = "sdpa_watched"


class Heads(NamedTuple):
    """Two sides whose products, after a softmax over the right side's tokens, are attention matrices.

    Attributes:
        left: [sequences, heads, tokens, channels].
        right: The same shape, or with one head for each group of left heads.
        scale: Factor of the products.
        visible: bool [sequences or 1, 1, tokens, tokens], which right tokens each left token sees. None if each token
            sees itself and all earlier ones.
    """

    left: Tensor
    right: Tensor
    scale: float
    visible: Tensor | None = None

    def first(self, tokens: int) -> Heads:
        """Return the same for the first `tokens` tokens, which do not depend on later ones."""
        visible = None if self.visible is None else self.visible[..., :tokens, :tokens]
        return Heads(self.left[:, :, :tokens], self.right[:, :, :tokens], self.scale, visible)

    def ungrouped(self) -> Heads:
        """Return the same with a right head for each left head."""
        groups = self.left.shape[1] // self.right.shape[1]
        return self._replace(right=self.right.repeat_interleave(groups, dim=1)) if groups > 1 else self


def teacher_layer(attention: Attention, teacher_layers: int) -> int:
    """Return the index of the teacher's layer whose attention the student imitates."""
    # As in `student_depth`, the small term corrects products like 0.7 * 30, which binary rounding puts below 21.
    return max(1, int(attention.teacher_depth * teacher_layers + 1e-9)) - 1


def check_attention(attention: Attention, student: ModelSpec, teacher: ModelSpec) -> None:
    """Check that attention can be aligned between models of these shapes.

    Raises:
        InputError: Maps are compared and the numbers of heads differ, relation heads do not divide a width, or the
            teacher's layer is the first, whose input is not the output of a layer. Or a model has layers without
            attention.
    """
    for spec in (student, teacher):
        if spec.architecture in WHOLE_FAMILIES:
            raise InputError(
                f"attention is not compared in a {spec.architecture}, because "
                f"{WHOLE_FAMILIES[spec.architecture].why}: leave distillation.attention out"
            )
    if teacher_layer(attention, teacher.layers) == 0:
        raise InputError(
            f"attention.teacher_depth is {attention.teacher_depth}, the first of the teacher's {teacher.layers} "
            "layers: raise it so that it reaches the second"
        )
    if attention.kind == "maps":
        if student.heads != teacher.heads:
            raise InputError(
                f"attention.kind is maps, which are compared head by head, but the student has {student.heads} heads "
                f"and the teacher {teacher.heads}: use relations"
            )
        return
    for name, spec in (("student", student), ("teacher", teacher)):
        for what, heads in (("queries", spec.heads), ("keys and values", spec.kv_heads)):
            if heads * spec.head_dim % attention.relation_heads:
                raise InputError(
                    f"attention.relation_heads is {attention.relation_heads}, which does not divide the {name}'s "
                    f"{heads * spec.head_dim} channels of {what}: choose a divisor of that"
                )


# Modules whose queries and keys are watched, and the functions that receive them. Empty except in the context of
# `watch`.
_watchers: dict[nn.Module, Callable[[Heads], None]] = {}


def _watched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Compute the models' usual attention, and pass queries and keys, as they enter the product, to the watcher."""
    if module in _watchers:
        _watchers[module](Heads(query, key, options["scaling"], attention_mask))
    return attention_forward(module, query, key, value, attention_mask, **options)


register(_WATCHED, _watched_attention)


@contextmanager
def watch(model: Any, attention: Attention, layer: int = -1) -> Iterator[list[Heads]]:
    """Within the context, collect what the attention of one layer is compared by, in the model's forward pass.

    Maps are made from the queries and keys that enter the product: rotated, normalised if the family does so, and
    masked as the model masks. Relations are made from the outputs of the query, key and value projections, with a
    causal mask. Neither needs an attention that keeps its matrices, so the model runs on SDPA.

    Yields:
        A list that the forward pass fills. It gets one `Heads` for maps, or one each of queries, keys and values for
            relations.
    """
    found: list[Heads] = []
    block: Any = decoder_layers(model)[layer]
    family = get_family(model.config.model_type)
    # The layer that reads the heads' outputs is a part of the attention module.
    module = block.get_submodule(family.reading(Axis.QUERIES).rpartition(".")[0])
    if attention.kind == "maps":
        before = model.config._attn_implementation
        model.set_attn_implementation(_WATCHED)
        _watchers[module] = found.append
        try:
            yield found
        finally:
            del _watchers[module]
            model.set_attn_implementation(before)
        return

    projections = {
        block.get_submodule(linear.name): linear.outputs
        for linear in family.linears
        if linear.outputs in (Axis.QUERIES, Axis.KEYS, Axis.FUSED)
    }
    heads = model.config.num_attention_heads

    def relate(module: nn.Module, arguments: Any, output: Tensor) -> None:
        """Collect the output of a projection as a side of the relations."""
        parts = [output]
        if projections[module] is Axis.FUSED:
            # A fused projection returns the query, key and value of each head next to each other.
            parts = [part.flatten(-2) for part in output.unflatten(-1, (heads, 3, -1)).unbind(-2)]
        for part in parts:
            side = part.unflatten(-1, (attention.relation_heads, -1)).transpose(1, 2)
            found.append(Heads(side, side, 1 / math.sqrt(side.shape[-1])))

    handles = [projection.register_forward_hook(relate) for projection in projections]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class TeacherBlock:
    """One layer of the teacher, which computes its attention for the comparison from its cached input.

    This costs one layer instead of the whole teacher, and needs only one state on disk.

    Args:
        model: The teacher. Everything except the layer is removed from it.
        layer: Index of the layer.
        device: Where the layer computes.
    """

    def __init__(self, model: Any, layer: int, device: str = "cpu") -> None:
        self.layer = layer
        _keep_layer(model, layer)
        model.set_input_embeddings(nn.Identity())
        model.set_output_embeddings(nn.Identity())
        self._model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def heads(self, states: Tensor, attention: Attention) -> list[Heads]:
        """Return what `watch` collects in a forward pass over the layer's input.

        Args:
            states: float32 [sequences, tokens, width], the layer's input.
            attention: What is compared.
        """
        with watch(self._model, attention) as found:
            self._model.base_model(inputs_embeds=states, use_cache=False)
        return found


def _keep_layer(model: Any, layer: int) -> None:
    """Remove all blocks except one, in place."""
    block: Any = decoder_layers(model)[layer]
    model.base_model.layers = nn.ModuleList([block])
    numbered: list[Any] = [module for module in block.modules() if hasattr(module, "layer_idx")]
    for module in numbered:
        module.layer_idx = 0
    model.config.num_hidden_layers = 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer]]


def attention_loss(student: list[Heads], teacher: list[Heads], counted: Tensor | None = None) -> Tensor:
    """Return KL(teacher || student) of attention matrices, as a mean over kinds, sequences, heads and tokens.

    MiniLMv2 (arXiv 2012.15828) sums over the kinds (queries, keys, values). A mean has the same size as the loss of
    maps.

    Args:
        student: The student's heads, with at least n tokens.
        teacher: The teacher's heads of the same kinds, with n tokens.
        counted: bool [sequences, n or more], the tokens whose attention counts: all except padding. Padding comes last,
            so that no other token attends to it. None for all.
    """
    losses = []
    for theirs, target in zip(student, teacher, strict=True):
        tokens = target.left.shape[2]
        ours = theirs.first(tokens).ungrouped()
        visible = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=ours.left.device).tril()
        for mask in (ours.visible, target.visible):
            # If the windows differ, only tokens that both models see are compared.
            visible = visible if mask is None else visible & mask
        rows = None if counted is None else counted[:, :tokens]
        losses.append(_SoftmaxKL.apply(ours.left, ours.right, ours.scale, target.ungrouped(), visible, rows))
    return torch.stack(losses).mean()


class _SoftmaxKL(torch.autograd.Function):
    """Computes value and gradient together, a few matrices at a time, so [heads, tokens, tokens] is never in memory.

    With s the student's scaled products, p and q the teacher's and the student's softmax, dKL / ds = q - p.
    """

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, scale: float, target: Heads, visible: Tensor, counted: Tensor | None
    ) -> Tensor:
        """Return the loss, and compute both gradients too, a few matrices at a time."""
        sequences, heads, tokens, _ = left.shape
        work = torch.promote_types(left.dtype, torch.float32)
        total = torch.zeros((), dtype=work, device=left.device)
        gradients = [torch.empty_like(side, memory_format=torch.contiguous_format) for side in (left, right)]
        step = max(1, (_CPU_CHUNK if left.device.type == "cpu" else _CHUNK) // tokens**2)
        # A tensor, so that the process need not wait for the GPU to count tokens.
        weight = 1 / (heads * (sequences * tokens if counted is None else counted.sum().clamp_min(1).to(work)))
        for sequence in range(sequences):
            hidden = ~visible[min(sequence, len(visible) - 1)]
            for start in range(0, heads, step):
                part = (sequence, slice(start, start + step))
                a, b = left[part].to(work), right[part].to(work)
                log_q = _log_softmax(a, b, scale, hidden)
                log_p = _log_softmax(target.left[part].to(work), target.right[part].to(work), target.scale, hidden)
                p = log_p.exp()
                distance = log_p.sub_(log_q).mul_(p)
                slope = log_q.exp_().sub_(p).mul_(scale * weight)
                if counted is not None:
                    row = counted[sequence, :, None]
                    distance.mul_(row)
                    slope.mul_(row)
                total += distance.sum()
                gradients[0][part] = slope @ b
                gradients[1][part] = slope.mT @ a
        ctx.save_for_backward(*gradients)
        return total * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        left, right = (gradient * upstream.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return left, right, None, None, None, None


def _log_softmax(left: Tensor, right: Tensor, scale: float, hidden: Tensor) -> Tensor:
    return (left @ right.mT).mul_(scale).masked_fill_(hidden, _HIDDEN).log_softmax(dim=-1)
