"""The initial student as a plain transformers model: from parts of the teacher, from scratch, or pretrained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autodistill.data.student_template import copy_text
from autodistill.distillation.student.pretrained import load_pretrained, pretrained_spec
from autodistill.distillation.student.repair import Refit, ffn_moments, last_matrix, repaired
from autodistill.distillation.student.shapes import cut_spec, layer_choices, student_depth
from autodistill.distillation.teacher.importance import PartImportance
from autodistill.models.config import per_layer_config, resized, spec_from_config
from autodistill.models.families import Axis, get_family
from autodistill.models.layer_widths import model_class
from autodistill.models.loading import ATTENTION, load_model, model_from_weights, save_model
from autodistill.models.model_folder import read_config
from autodistill.models.spec import ModelSpec
from autodistill.models.stored_tensors import stored_type
from autodistill.models.tensors import Role
from autodistill.strategy.strategy import Init


def init_spec(init: Init, teacher: ModelSpec, pretrained: Path | None = None) -> ModelSpec:
    """Return the shape of the student that `init` makes; its embedding table, and texts, have the teacher's tokens.

    Args:
        init: How the student begins.
        teacher: The teacher's shape.
        pretrained: Folder of the model that `init.model` refers to; None where it is to be found by that reference.

    Raises:
        InputError: As `shapes.cut_spec`, or a pretrained model that is not found.
    """
    if init.source == "pretrained":
        spec = pretrained_spec(init.model) if pretrained is None else spec_from_config(read_config(pretrained))
        spec = resized(spec, vocabulary=teacher.vocabulary)
        return replace(spec, text_not_in_gguf=teacher.text_not_in_gguf, process_bytes=teacher.process_bytes)
    return cut_spec(init, teacher)


def kept_layers(init: Init, teacher_layers: int, calibration: PartImportance | None = None) -> tuple[int, ...]:
    """Return the teacher layer that each student layer is copied from, or corresponds to; the last layer is among them.

    Those of `shapes.layer_choices`; "influence" leaves out the block between whose input and output the hidden state
    turns least (Gromov et al., 2024, arXiv:2403.17887), and "block-influence" the layers each of which turns it least,
    by the score of Men et al. (2024, arXiv:2403.03853). A student that is not made of the teacher's layers stands for
    those of its relative depth.

    Args:
        init: How the student begins.
        teacher_layers: Number of the teacher's layers.
        calibration: Of the teacher, where `init.by_influence`.
    """
    if init.source == "pretrained":
        return same_depth(pretrained_spec(init.model).layers, teacher_layers)
    depth = student_depth(init, teacher_layers)
    if init.source == "scratch":
        return same_depth(depth, teacher_layers)
    choices = layer_choices(init, teacher_layers)
    if not init.by_influence or depth == 1:
        return choices[0]
    if calibration is None:
        raise ValueError("layers are chosen by influence from a calibration")
    if init.layers == "block-influence":
        alike = calibration.similarity.diagonal(1)[1:-1].argsort(descending=True, stable=True)
        return (0, *sorted((alike[teacher_layers - depth :] + 1).tolist()), teacher_layers - 1)
    return choices[int(calibration.similarity.diagonal(teacher_layers - depth)[1:depth].argmax())]


def same_depth(layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return the teacher layer at the same relative depth as each layer of a student, if none was copied.

    With it, `alignment.layer_map` gives student layer j of n the output of teacher layer round((j + 1) m / n) - 1 of m,
    at least the first.
    """
    return tuple(max(round(layer * teacher_layers / layers), min(layer, 1)) for layer in range(layers))


class Selection(NamedTuple):
    """The kept parts of a teacher; None for everything.

    Attributes:
        layers: Indices, ascending.
        channels: int64 [width].
        neurons: Of each kept layer int64 [its ffn width], or None.
        groups: int64 [layers, key-value heads], for each kept layer its own.
        refits: Of each kept layer the last matrix of its FFN, in place of the teacher's; None where that stays.
    """

    layers: tuple[int, ...]
    channels: Tensor | None
    neurons: tuple[Tensor | None, ...]
    groups: Tensor | None
    refits: Sequence[Refit | None] = ()


def select(
    spec: ModelSpec, teacher: ModelSpec, layers: tuple[int, ...], calibration: PartImportance | None
) -> Selection:
    """Keep the most important channels, neurons and groups of heads, each in the teacher's order.

    Args:
        spec: Shape of the student.
        teacher: Shape of the teacher.
        layers: Those kept.
        calibration: Of the teacher; without one the first of each are kept, which is enough to measure speed.
    """

    kept = list(layers)
    channels = torch.zeros(teacher.width) if calibration is None else calibration.channels
    neurons = torch.zeros(len(kept), teacher.ffn_width) if calibration is None else calibration.neurons[kept]
    whole = [row[: teacher.ffn_by_layer[layer]] for layer, row in zip(kept, neurons, strict=True)]
    groups = torch.zeros(len(kept), teacher.kv_heads) if calibration is None else calibration.groups[kept]
    return Selection(
        layers=layers,
        channels=_most_important(channels, spec.width),
        neurons=tuple(_most_important(own, width) for own, width in zip(whole, spec.ffn_by_layer, strict=True)),
        groups=_most_important(groups, spec.kv_heads),
    )


def _most_important(importance: Tensor, count: int) -> Tensor | None:
    if count == importance.shape[-1]:
        return None
    # A stable sort, so that equal parts are kept in the teacher's order on every machine.
    return importance.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def cut(model: Any, spec: ModelSpec, selection: Selection) -> Any:
    """Return a float32 model of the selected parts of another; float32 tensors that are kept whole are shared."""
    family = get_family(spec.architecture)
    parameters = dict(model.named_parameters())

    def kept(axis: Axis, layer: int) -> Tensor | None:
        """Return the indices that a layer keeps along an axis; None where it keeps all."""
        if axis is Axis.WIDTH:
            return selection.channels
        if axis is Axis.FFN:
            return selection.neurons[layer]
        if axis in (Axis.QUERIES, Axis.KEYS, Axis.FUSED) and selection.groups is not None:
            heads = {Axis.QUERIES: spec.heads // spec.kv_heads, Axis.KEYS: 1, Axis.FUSED: 3}[axis]
            block = heads * spec.head_dim
            return (selection.groups[layer][:, None] * block + torch.arange(block)).flatten()
        return None

    weights = {}
    last = f"{last_matrix(spec.architecture)}.weight"
    for tensor in spec.tensors:
        layer, name, refit = -1, tensor.name, None
        if (part := family.layer_part(name)) is not None:
            layer = part[0]
            name = f"{family.body}.layers.{selection.layers[layer]}.{part[1]}"
            if selection.refits and part[1] == last:
                refit = selection.refits[layer]
        weight = parameters[name].detach() if refit is None else refit.matrix
        for dimension, axis in enumerate(family.axes(tensor.name)):
            indices = None if refit is not None and axis is Axis.FFN else kept(axis, layer)
            if indices is not None:
                weight = weight.index_select(dimension, indices.to(weight.device))
        weights[tensor.name] = weight.float()
    if family.scaled_embeddings and selection.channels is not None:
        _keep_scale(weights, spec, math.sqrt(model.config.hidden_size / spec.width))
    return model_from_weights(model, _config_changes(model.config, spec, selection.layers), weights)


def _keep_scale(weights: dict[str, Tensor], spec: ModelSpec, factor: float) -> None:
    """Enlarge the embedding table to make up for the model's own factor, the root of the width, which is now smaller.

    The stream then begins at the teacher's scale, to which its blocks add at theirs. A tied head would be larger as
    well: the final norm makes up for it, so that logits stay what they are.
    """
    family = get_family(spec.architecture)
    table, norm = (f"{family.body}.{name}.weight" for name in (family.embedding, family.final_norm))
    weights[table] = weights[table] * factor
    if spec.tied:
        above = 1.0 if family.norm_role is Role.NORM_ABOVE_ONE else 0.0
        weights[norm] = (weights[norm] + above) / factor - above


def _config_changes(config: Any, spec: ModelSpec, layers: tuple[int, ...]) -> dict[str, Any]:
    """Return the transformers config fields that differ in a student of this shape with these layers."""
    changes: dict[str, Any] = {
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn_width,
    }
    if not get_family(spec.architecture).heads_fill_width:
        changes |= {"num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim}
    if spec.ffn_widths or config.is_heterogeneous:
        changes["per_layer_config"] = per_layer_config(spec) or None
    if getattr(config, "layer_types", None):
        changes["layer_types"] = [config.layer_types[index] for index in layers]
    return changes


def new_student(teacher: Path, init: Init, seed: int) -> Any:
    """Return a model in the teacher's proportions with new weights, drawn from `seed` as transformers draws them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(teacher, local_files_only=True, trust_remote_code=False)
    spec = cut_spec(init, spec_from_config(config.to_dict()))
    changes = _config_changes(config, spec, tuple(range(spec.layers)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = type(config).from_dict(config.to_dict() | changes)
        model = model_class(config)._from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    return model.eval()


def build_student(
    teacher: Path,
    init: Init,
    *,
    seed: int = 0,
    calibration: PartImportance | None = None,
    pretrained: Path | None = None,
    moments: Iterable[Tensor] | None = None,
) -> tuple[Any, tuple[int, ...]]:
    """Return the initial student, in float32 on the CPU, and the teacher layer for each of its layers.

    Args:
        teacher: Folder of the teacher.
        init: How the student begins.
        seed: Of new weights.
        calibration: Of the teacher, where `init.selective`.
        pretrained: Folder of the model that `init.model` refers to.
        moments: As `cut_student` takes them.

    Raises:
        InputError: Sizes that the family cannot have, or a pretrained model of other tokens.
    """
    if init.selective and calibration is None:
        raise ValueError("a calibration says which parts of the teacher matter: make one first")
    if init.source == "teacher":
        # In the folder's own type: what is kept becomes float32, the rest need not, where nothing is computed with it.
        held = torch.float32 if init.repair else getattr(torch, stored_type(teacher))
        return cut_student(load_model(teacher, held), init, calibration, moments)
    teacher_layers = spec_from_config(read_config(teacher)).layers
    if init.source == "scratch":
        return new_student(teacher, init, seed), kept_layers(init, teacher_layers)
    # By its folder, since a machine that trains may have nothing at the reference.
    assert pretrained is not None
    layers = spec_from_config(read_config(pretrained)).layers
    return load_pretrained(pretrained, teacher), same_depth(layers, teacher_layers)


def cut_student(
    model: Any,
    init: Init,
    calibration: PartImportance | None,
    moments: Iterable[Tensor] | None = None,
    device: str = "cpu",
) -> tuple[Any, tuple[int, ...]]:
    """Return the parts of a teacher that `init` keeps, and the kept layers.

    Args:
        model: The teacher; in float32 where `init.repair`.
        init: What is kept.
        calibration: Of the teacher, where `init.selective`.
        moments: `repair.ffn_moments` of the calibration's text, where they are known.
        device: Where the teacher lies.
    """
    whole = spec_from_config(model.config.to_dict())
    spec = cut_spec(init, whole)
    layers = kept_layers(init, whole.layers, calibration)
    selection = select(spec, whole, layers, calibration)
    # Without a calibration shapes are all that counts; and a fraction may round to the whole.
    if init.repair and calibration is not None:
        found = ffn_moments(model, calibration.text, device) if moments is None else moments
        refits = repaired(model, dict(zip(layers, spec.ffn_by_layer, strict=True)), found)
        selection = selection._replace(
            neurons=tuple(None if refit is None else refit.neurons for refit in refits), refits=refits
        )
    return cut(model, spec, selection), layers


def save_student(model: Any, text: Path, folder: Path) -> None:
    """Write a model as a transformers folder, with the tokenizer and the other files about its text.

    Args:
        model: Of transformers.
        text: The teacher's folder, or `dataset.rendering_folder` of a student that learnt another template.
        folder: To be written.
    """
    save_model(model, folder)
    copy_text(text, folder)
