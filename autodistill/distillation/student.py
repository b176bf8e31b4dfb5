"""How a student begins: the teacher's layers that are kept, and the plain transformers model made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from autodistill.distillation.teacher import load_model
from autodistill.errors import InputError
from autodistill.strategy import Init


def student_depth(init: Init, teacher_layers: int) -> int:
    """Number of layers kept: the fraction rounded down, at least one."""
    # 0.7 * 30 is 20.999... in binary; the nudge keeps such products on the side that was meant.
    return max(1, int(init.depth * teacher_layers + 1e-9))


def kept_layers(init: Init, teacher_layers: int) -> tuple[int, ...]:
    """Indices of the teacher's layers that the student keeps, ascending, the first and the last among them.

    "even" spreads them evenly; "contiguous" keeps the first ones and the last, leaving out one block of late layers.
    """
    depth = student_depth(init, teacher_layers)
    if depth == 1:
        return (teacher_layers - 1,)
    if init.layers == "contiguous":
        return (*range(depth - 1), teacher_layers - 1)
    return tuple(round(i * (teacher_layers - 1) / (depth - 1)) for i in range(depth))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's list of transformer blocks."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"{type(model).__name__} has no list of layers at model.layers: this family is not supported")
    return layers


def keep_layers(model: Any, kept: tuple[int, ...]) -> None:
    """Removes all blocks but those in `kept`, in place; the config and the blocks' own indices follow."""
    layers = decoder_layers(model)
    model.model.layers = nn.ModuleList(layers[index] for index in kept)
    for position, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]


def build_student(teacher: Path, init: Init) -> tuple[Any, tuple[int, ...]]:
    """The student before any training, in float32 on the CPU, and the teacher layer each of its layers is.

    Args:
        teacher: Folder of the teacher.
        init: How the student begins.
    """
    model = load_model(teacher, torch.float32)
    kept = kept_layers(init, len(decoder_layers(model)))
    keep_layers(model, kept)
    return model, kept
