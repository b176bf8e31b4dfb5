"""Builds the initial student as a plain transformers model: from parts of the teacher, from scratch, or pretrained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autodistill.data.student_template import copy_text
from autodistill.distillation.student.pretrained import load_pretrained, pretrained_spec
from autodistill.distillation.student.repair import (
    REPAIRED,
    Moments,
    Refit,
    columns_of,
    last_matrix,
    part_moments,
    repaired,
)
from autodistill.distillation.student.shapes import cut_spec, layer_choices, student_depth
from autodistill.distillation.teacher.importance import PartImportance
from autodistill.models.config import per_layer_config, resized, spec_from_config
from autodistill.models.families import WHOLE_FAMILIES, Axis, get_family
from autodistill.models.layer_widths import model_class
from autodistill.models.loading import held, implementations, load_model, model_from_weights, save_model
from autodistill.models.model_folder import read_config
from autodistill.models.spec import ModelSpec
from autodistill.models.stored_tensors import stored_type
from autodistill.models.tensors import Role
from autodistill.strategy.strategy import Init


def init_spec(init: Init, teacher: ModelSpec, pretrained: Path | None = None) -> ModelSpec:
    """Return the shape of the student that `init` makes. Its vocabulary is the teacher's.

    Args:
        init: How the student begins.
        teacher: The teacher's shape.
        pretrained: Folder of the model that `init.model` refers to, or None to find it by that reference.

    Raises:
        InputError: As for `shapes.cut_spec`, or a pretrained model is not found.
    """
    if init.source == "pretrained":
        spec = pretrained_spec(init.model) if pretrained is None else spec_from_config(read_config(pretrained))
        spec = resized(spec, vocabulary=teacher.vocabulary)
        return replace(spec, text_not_in_gguf=teacher.text_not_in_gguf, process_bytes=teacher.process_bytes)
    return cut_spec(init, teacher)


def kept_layers(init: Init, teacher_layers: int, calibration: PartImportance | None = None) -> tuple[int, ...]:
    """Return the teacher layer that each student layer is copied from or stands for. The last layer is always included.

    The layers are one of `shapes.layer_choices`. "influence" leaves out the block whose output state has the smallest
    angle to its input state (Gromov et al., 2024, arXiv:2403.17887). "block-influence" leaves out the single layers
    that turn the state least, by the score of Men et al. (2024, arXiv:2403.03853). If a student has no layers of the
    teacher, its layers stand for those at the same relative depth.

    Args:
        init: How the student begins.
        teacher_layers: Number of the teacher's layers.
        calibration: The teacher's calibration, needed with `init.by_influence`.
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
    """Return the teacher layer at the same relative depth as each layer of a student that has no copied layers.

    `alignment.layer_map` then gives student layer j of n the output of teacher layer round((j + 1) m / n) - 1 of m,
    but never of one before the first.
    """
    return tuple(max(round(layer * teacher_layers / layers), min(layer, 1)) for layer in range(layers))


class Selection(NamedTuple):
    """The kept parts of a teacher, as indices. None keeps everything.

    Attributes:
        layers: Indices of the kept layers, ascending.
        channels: int64 [width], or None.
        neurons: For each kept layer, int64 [its FFN width], or None.
        groups: int64 [layers, key-value heads], a row for each kept layer, or None.
        refits: For each kept layer, what replaces the last matrices of its FFN and its attention, if they were cut and
            repaired.
    """

    layers: tuple[int, ...]
    channels: Tensor | None
    neurons: tuple[Tensor | None, ...]
    groups: Tensor | None
    refits: Sequence[Mapping[Axis, Refit]] = ()


def select(
    spec: ModelSpec, teacher: ModelSpec, layers: tuple[int, ...], calibration: PartImportance | None
) -> Selection:
    """Keep the most important channels, neurons and groups of heads, each in the teacher's order.

    Args:
        spec: Shape of the student.
        teacher: Shape of the teacher.
        layers: The kept layers.
        calibration: The teacher's calibration. Without one, the first parts of each kind are kept, which is enough to
        measure speed.
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
    """Return a float32 model of the selected parts of another one. It shares float32 tensors that are kept whole."""
    parameters = held(model)
    if spec.architecture in WHOLE_FAMILIES:
        return model_from_weights(model, {}, {one.name: parameters[one.name].detach().float() for one in spec.tensors})
    family = get_family(spec.architecture)

    def kept(axis: Axis, layer: int) -> Tensor | None:
        """Return the indices that a layer keeps along an axis, or None if it keeps all."""
        if axis is Axis.WIDTH:
            return selection.channels
        if axis is Axis.FFN:
            return selection.neurons[layer]
        if axis in (Axis.QUERIES, Axis.KEYS, Axis.FUSED) and selection.groups is not None:
            heads = {Axis.QUERIES: spec.heads // spec.kv_heads, Axis.KEYS: 1, Axis.FUSED: 3}[axis]
            return columns_of(selection.groups[layer], heads * spec.head_dim)
        return None

    weights = {}
    lasts = {f"{last_matrix(spec.architecture, axis)}.weight": axis for axis in REPAIRED}
    for tensor in spec.tensors:
        layer, name, refit = -1, tensor.name, None
        if (part := family.layer_part(name)) is not None:
            layer = part[0]
            name = f"{family.body}.layers.{selection.layers[layer]}.{part[1]}"
            if selection.refits and part[1] in lasts:
                refit = selection.refits[layer].get(lasts[part[1]])
        weight = parameters[name].detach() if refit is None else refit.matrix
        for dimension, axis in enumerate(family.axes(tensor.name)):
            # A fitted matrix has only the inputs that are kept.
            indices = None if refit is not None and axis in REPAIRED else kept(axis, layer)
            if indices is not None:
                weight = weight.index_select(dimension, indices.to(weight.device))
        weights[tensor.name] = weight.float()
    if family.scaled_embeddings and selection.channels is not None:
        _keep_scale(weights, spec, math.sqrt(model.config.hidden_size / spec.width))
    return model_from_weights(model, _config_changes(model.config, spec, selection.layers), weights)


def _keep_scale(weights: dict[str, Tensor], spec: ModelSpec, factor: float) -> None:
    """Enlarge the embedding table, because the model's own factor, the root of the width, is now smaller.

    The residual stream then begins at the teacher's scale, which fits what the blocks add. A tied head grows too, so
    the final norm is reduced to keep the logits the same.
    """
    family = get_family(spec.architecture)
    table, norm = (f"{family.body}.{name}.weight" for name in (family.embedding, family.final_norm))
    weights[table] = weights[table] * factor
    if spec.tied:
        above = 1.0 if family.norm_role is Role.NORM_ABOVE_ONE else 0.0
        weights[norm] = (weights[norm] + above) / factor - above


def _config_changes(config: Any, spec: ModelSpec, layers: tuple[int, ...]) -> dict[str, Any]:
    """Return the changed fields of the transformers config for a student of this shape with these layers."""
    if spec.architecture in WHOLE_FAMILIES:
        return {}
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
    """Return a model in the teacher's proportions with new weights, initialised by transformers from `seed`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(teacher, local_files_only=True, trust_remote_code=False)
    spec = cut_spec(init, spec_from_config(config.to_dict()))
    changes = _config_changes(config, spec, tuple(range(spec.layers)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = type(config).from_dict(config.to_dict() | changes)
        kind = model_class(config)
        model = kind._from_config(config, dtype=torch.float32, **implementations(kind))
    return model.eval()


def build_student(
    teacher: Path,
    init: Init,
    *,
    seed: int = 0,
    calibration: PartImportance | None = None,
    pretrained: Path | None = None,
    moments: Iterable[Moments] | None = None,
) -> tuple[Any, tuple[int, ...]]:
    """Return the initial student, in float32 on the CPU, and the teacher layer for each of its layers.

    Args:
        teacher: Folder of the teacher.
        init: How the student begins.
        seed: Seed of new weights.
        calibration: The teacher's calibration, needed with `init.selective`.
        pretrained: Folder of the model that `init.model` refers to.
        moments: As for `cut_student`.

    Raises:
        InputError: The family cannot have these sizes, or a pretrained model has other tokens.
    """
    if init.selective and calibration is None:
        raise ValueError("a calibration says which parts of the teacher matter: make one first")
    if init.source == "teacher":
        # Load in the folder's own type. Only the kept parts must become float32, unless the repair computes with all of
        # them.
        held = torch.float32 if init.repair else getattr(torch, stored_type(teacher))
        return cut_student(load_model(teacher, held), init, calibration, moments)
    teacher_layers = spec_from_config(read_config(teacher)).layers
    if init.source == "scratch":
        return new_student(teacher, init, seed), kept_layers(init, teacher_layers)
    # Use the folder, because the reference may not exist on the machine that trains.
    assert pretrained is not None
    layers = spec_from_config(read_config(pretrained)).layers
    return load_pretrained(pretrained, teacher), same_depth(layers, teacher_layers)


def cut_student(
    model: Any,
    init: Init,
    calibration: PartImportance | None,
    moments: Iterable[Moments] | None = None,
    device: str = "cpu",
) -> tuple[Any, tuple[int, ...]]:
    """Return the parts of a teacher that `init` keeps, and the kept layers.

    Args:
        model: The teacher, in float32 if `init.repair`.
        init: Which parts are kept.
        calibration: The teacher's calibration, needed with `init.selective`.
        moments: `repair.part_moments` of the calibration's text, if they are known already.
        device: The teacher's device.
    """
    whole = spec_from_config(model.config.to_dict())
    spec = cut_spec(init, whole)
    layers = kept_layers(init, whole.layers, calibration)
    selection = select(spec, whole, layers, calibration)
    # Without a calibration, only shapes matter, so nothing is repaired.
    if init.repair and calibration is not None:
        found = part_moments(model, calibration.text, device) if moments is None else moments
        selection = _with_refits(selection, repaired(model, spec, layers, found))
    return cut(model, spec, selection), layers


def _with_refits(selection: Selection, refits: Sequence[Mapping[Axis, Refit]]) -> Selection:
    """Return a selection that keeps the parts for which the last matrices were fitted."""
    neurons, groups = (
        [one[axis].kept.cpu() if axis in one else None for one in refits] for axis in (Axis.FFN, Axis.QUERIES)
    )
    fitted = [one for one in groups if one is not None]
    return selection._replace(
        neurons=tuple(neurons), groups=torch.stack(fitted) if fitted else selection.groups, refits=refits
    )


def save_student(model: Any, text: Path, folder: Path) -> None:
    """Write a model as a transformers folder, with the tokenizer and the other files about its text.

    Args:
        model: A transformers model.
        text: The teacher's folder, or `dataset.rendering_folder` for a student that learned another template.
        folder: The folder to write.
    """
    save_model(model, folder)
    copy_text(text, folder)
