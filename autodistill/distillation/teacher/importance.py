"""Measures the importance of each part of the teacher, from its activations on a few training sequences."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autodistill.data.dataset import TokenSet
from autodistill.inference.batching import map_sequences
from autodistill.inference.divided_part import whole_input
from autodistill.inference.tensor_parallel import inputs_gathered, is_divided
from autodistill.models.config import spec_from_config
from autodistill.models.families import Axis, get_family
from autodistill.models.spec import ModelSpec
from autodistill.utils.durable import put
from autodistill.utils.file_locks import exclusive
from autodistill.utils.hashing import content_hash

SEQUENCES = 16
"""Number of training sequences that are read. They are the first of the split, so they depend on the data alone."""
TEXT_TOKENS = 4096
"""Number of training tokens for the repair of students, in sequences that are spread evenly over the split."""
_VERSION = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class PartImportance:
    """Mean activations over all tokens of the calibration sequences, in float64, and text for the repair of students.

    The importances are Minitron's (Muralidharan et al., 2024, arXiv:2407.14679): mean magnitudes of activations.

    Attributes:
        similarity: [layers + 1, layers + 1], cosine of the inputs of layers i and j. The last index stands for the
            output of the last layer. 1 - similarity[i, i + 1] is block influence (Men et al., 2024, arXiv:2403.03853).
        neurons: [layers, ffn width], magnitude of each neuron's activation. For a narrower layer, the rest is 0.
        groups: [layers, key-value heads], Euclidean norm of each head's output, summed over the heads of a group.
        channels: [width], magnitude of each channel after a norm of the width, summed over these norms.
        text: int32 [sequences, length], training sequences for the repair of students.
    """

    similarity: Tensor
    neurons: Tensor
    groups: Tensor
    channels: Tensor
    text: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int32))

    def save(self, path: Path) -> None:
        """Write a safetensors file, completely or not at all."""
        partial_file = path.with_name(f".{uuid.uuid4().hex}")
        try:
            save_file({item.name: getattr(self, item.name) for item in fields(self)}, partial_file)
            put(partial_file, path)
        finally:
            partial_file.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> PartImportance:
        """Read what `save` wrote."""
        return cls(**load_file(path))


def measure_importance(model: Any, data: TokenSet, device: str = "cpu") -> PartImportance:
    """Run a teacher over the first `SEQUENCES` sequences of `data`, and keep others for the repair of students.

    Args:
        model: The teacher, in float32.
        data: Training sequences.
        device: Where the teacher runs. It is moved there.
    """
    model.to(device).eval()
    spec = spec_from_config(model.config.to_dict())
    family = get_family(spec.architecture)
    layers = model.base_model.layers
    here = local()  # sequences are read in parallel, each on its own thread

    def see_state(module: Any, inputs: tuple[Tensor, ...]) -> None:
        here.states.append(inputs[0][0])

    def see_last(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        here.states.append(output[0])

    def see_neurons(index: int, module: Any, inputs: tuple[Tensor, ...]) -> None:
        magnitudes = _mean(whole_input(module, inputs)[0].abs())
        here.found.neurons[index, : len(magnitudes)] += magnitudes

    def see_heads(index: int, module: Any, inputs: tuple[Tensor, ...]) -> None:
        heads = whole_input(module, inputs)[0].unflatten(-1, (spec.kv_heads, -1, spec.head_dim))
        here.found.groups[index] += _mean(heads.norm(dim=-1).sum(dim=-1))

    def see_channels(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        here.found.channels.add_(_mean(output[0].abs()))

    def read(index: int) -> PartImportance:
        """Read one sequence."""
        here.states, here.found = [], _nothing(spec)
        tokens = data.tokens[index]
        with torch.no_grad():
            model.base_model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None].to(device), use_cache=False)
            directions = torch.nn.functional.normalize(torch.stack(here.states), dim=-1).flatten(1)
            here.found.similarity.add_((directions @ directions.T).double().cpu() / len(tokens))
        found: PartImportance = here.found
        return found

    norms = [layer.get_submodule(name) for layer in layers for name in family.norms]
    reads = [
        (index, f"{family.body}.layers.{index}.{family.reading(axis)}", see)
        for index in range(len(layers))
        for axis, see in ((Axis.FFN, see_neurons), (Axis.QUERIES, see_heads))
    ]
    count = min(SEQUENCES, len(data.tokens))
    with ExitStack() as watching:
        watching.enter_context(inputs_gathered(model, [name for _, name, _ in reads]))
        handles = [layer.register_forward_pre_hook(see_state) for layer in layers]
        handles.append(layers[-1].register_forward_hook(see_last))
        for index, name, see in reads:
            handles.append(model.get_submodule(name).register_forward_pre_hook(partial(see, index)))
        handles += [
            norm.register_forward_hook(see_channels)
            for norm in (*norms, model.base_model.get_submodule(family.final_norm))
        ]
        for handle in handles:
            watching.callback(handle.remove)
        # Processes that share a model must read the sequences in the same order.
        parts = map(read, range(count)) if is_divided(model) else map_sequences(read, count, device)
        total = _nothing(spec)
        for part in parts:
            for item in ("similarity", "neurons", "groups", "channels"):
                getattr(total, item).add_(getattr(part, item) / count)
    return replace(total, text=torch.from_numpy(_spread(data.tokens).astype(np.int32)))


def _nothing(spec: ModelSpec) -> PartImportance:
    """Return zeros in the shapes of a model's importance."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    return PartImportance(
        similarity=zeros(spec.layers + 1, spec.layers + 1),
        neurons=zeros(spec.layers, spec.ffn_width),
        groups=zeros(spec.layers, spec.kv_heads),
        channels=zeros(spec.width),
    )


def _mean(magnitudes: Tensor) -> Tensor:
    return magnitudes.double().mean(dim=0).cpu()


def _spread(tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    count = min(len(tokens), max(1, TEXT_TOKENS // tokens.shape[1]))
    return tokens[(np.arange(count) * 2 + 1) * len(tokens) // (2 * count)]


def ensure_importance(
    load_teacher: Callable[[], Any],
    *,
    teacher_fingerprint: str,
    data_fingerprint: str,
    data: TokenSet,
    root: Path,
    device: str = "cpu",
) -> Path:
    """Return the calibration file of a teacher on data, computed if it is not on disk.

    Args:
        load_teacher: Called only if the teacher must run. Returns the model in float32 on the CPU.
        teacher_fingerprint, data_fingerprint: Content hashes.
        data: The training split.
        root: Folder of all calibrations.
        device: Where the teacher runs.
    """
    key = content_hash([_VERSION, SEQUENCES, teacher_fingerprint, data_fingerprint], 16)
    path = root / f"{key}.safetensors"
    with exclusive(path):
        try:
            PartImportance.load(path)
        except (OSError, SafetensorError, TypeError):  # missing or damaged
            measure_importance(load_teacher(), data, device).save(path)
    return path
