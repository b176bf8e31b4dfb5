"""Checkpoints of a training: weights and optimiser states in one safetensors file, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autodistill.distillation.training.fsdp import like, whole
from autodistill.distillation.training.optimizers.adamw_8bit import own_states, whole_states
from autodistill.errors import TrialFailedError
from autodistill.estimates.training_memory import OptimizerState
from autodistill.utils.checksums import seal, unsealed

Named = Sequence[tuple[str, nn.Parameter]]


def gathered(trained: Named, optimizer: Any, *, keep: bool) -> dict[str, Tensor]:
    """Return whole weights and optimiser states by name, on the CPU, gathered from all processes.

    Tensors are gathered one after the other. All whole tensors together would take several times the memory of a GPU's
    shards.

    Args:
        trained: Names and weights.
        optimizer: AdamW over these weights, from torch, `rounded_states` or bitsandbytes.
        keep: Whether this process keeps the tensors. Otherwise it only gives its shards, and gets an empty result.
    """
    tensors = {}
    for name, tensor in _one_by_one(trained, optimizer):
        if keep:
            tensors[name] = tensor.cpu()
        del tensor  # free it before the next one is gathered
    return tensors


def _one_by_one(trained: Named, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trained:
        yield f"weight.{name}", whole(parameter.detach())
    for name, parameter in trained:
        for key, value in whole_states(parameter, optimizer.state.get(parameter, {})).items():
            # Optimisers of 8 and 16 bits count steps as int. Shared code books are cloned, since safetensors refuses
            # shared memory.
            shared = not isinstance(value, Tensor) or key.startswith("qmap")
            yield f"{key}.{name}", torch.as_tensor(value).clone() if shared else whole(value)


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write and seal a file under a temporary name, then rename it, so that a crash leaves the previous checkpoint."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata=unsealed(metadata))
        seal(temporary)
        os.replace(temporary, path)
    finally:
        # After a failure, such as a full disk, a half-written file would only take space.
        temporary.unlink(missing_ok=True)


def restore(
    path: Path, trained: Named, optimizer: Any, identity: Mapping[str, str], *, optimizer_state: OptimizerState
) -> dict[str, str]:
    """Load a checkpoint into weights and optimiser, on their device, and return its metadata.

    Args:
        path: The file.
        trained, optimizer: As for `gathered`. With several processes, each takes its shards.
        identity: Metadata that the file must have.
        optimizer_state: Type of the optimiser's moments. Older files do not record it, and are accepted.

    Raises:
        TrialFailedError: The checkpoint has another identity, or other optimiser states.
    """
    # Read on the CPU: for safetensors, "cuda" is the first GPU, even if the weights are on another one.
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        if {name: metadata[name] for name in identity} != dict(identity):
            raise TrialFailedError("error", f"{path.name} is a checkpoint of other stages or of another seed")
        written = metadata.get("optimizer_state", optimizer_state)
        if written != optimizer_state:
            raise TrialFailedError(
                "error",
                f"{path.name} has optimiser states in {written}, and does not go on with {optimizer_state}",
            )
        names = sorted(file.keys())  # the same order in all processes, which divide each tensor together
        for name, parameter in trained:
            with torch.no_grad():
                parameter.copy_(like(file.get_tensor(f"weight.{name}").to(parameter.device), parameter))
            keys = [key.partition(".")[0] for key in names if key.partition(".")[2] == name]
            states = {key: file.get_tensor(f"{key}.{name}").to(parameter.device) for key in keys if key != "weight"}
            if optimizer_state == "int8" and states:
                # Only the student's own weights are sharded. Other parameters and their states are whole in every
                # process.
                cut = name.startswith("student.")
                processes = int(metadata.get("processes", 1)) if cut else 1
                optimizer.state[parameter] = own_states(parameter, states, processes)
            else:
                optimizer.state[parameter] = {key: like(value, parameter) for key, value in states.items()}
    return metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a checkpoint. Only the file's header is read."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header["__metadata__"])
