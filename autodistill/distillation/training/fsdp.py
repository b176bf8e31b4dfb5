"""Trains one trial in several processes, each with a shard of every weight and a part of each step (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from autodistill.errors import InputError
from autodistill.models.layer_widths import model_class
from autodistill.models.loading import held

# How long a process may wait for another one in a collective operation. All wait while one sends or fetches a
# checkpoint, and a hundred gigabytes over a slow line take hours. A process that ended is noticed by the owner of the
# group.
_LONGEST_WAIT = timedelta(hours=6)


class Sharding:
    """The processes of one trial, as Accelerate finds them (`accelerate launch`, torchrun): one for each GPU.

    Every process gets the whole student and the same data, and calls the same methods in the same order.

    Args:
        device: "cuda", or "cpu" with gloo.

    Attributes:
        rank: Rank of this process.
        count: Number of processes.
    """

    def __init__(self, device: str = "cuda") -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        self._accelerator = Accelerator(
            cpu=device == "cpu", fsdp_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)]
        )
        if device == "cpu":
            # Accelerate shards only over accelerators, although FSDP2 itself also works over gloo.
            self._accelerator.state.distributed_type = DistributedType.FSDP
            self._accelerator.state.fsdp_plugin = plugin
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes

    def shard(self, model: Any) -> None:
        """Shard a model's weights in place, block by block. Its parameters become sharded ones.

        Args:
            model: The model, on the CPU. Each block moves to the device, which keeps only its shard, so no device has
                to hold all weights.
        """
        from accelerate.utils import fsdp2_prepare_model

        fsdp2_prepare_model(self._accelerator, model)
        # FSDP gathers and frees weights in the model's own call. Training calls the body and the head separately, so
        # that call must run only the body.
        model.forward = model.base_model.forward

    def share(self, indices: list[int]) -> list[int]:
        """Return this process's part of a step's sequences.

        Raises:
            InputError: The sequences do not divide evenly. The processes would wait for each other for ever.
        """
        if len(indices) % self.count:
            raise InputError(
                f"a step of {len(indices)} sequences does not divide over {self.count} processes: choose --step-tokens "
                "that do"
            )
        return indices[self.rank :: self.count]

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over all processes. Every process gets exactly the same result."""
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self._accelerator.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def first(self, value: float) -> float:
        """Return the value of the first process, in every process."""
        return self.sum({"value": float(value) if self.rank == 0 else 0.0})["value"]

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of unsharded parameters over all processes, as FSDP does for sharded ones."""
        for parameter in parameters:
            if parameter.grad is None:  # no token of this process counts
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.count

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the joint norm of whole gradients, from the shards of all processes and the unsharded gradients."""
        shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        # Squares are summed before the reduction, so that processes wait for each other only once.
        sharded = self._squares(shards)
        dist.all_reduce(sharded)
        return (sharded + self._squares([one for one in gradients if not isinstance(one, DTensor)])).sqrt()

    def _squares(self, tensors: list[Tensor]) -> Tensor:
        squares = [tensor.detach().square().sum() for tensor in tensors]
        return torch.stack(squares).sum() if squares else torch.zeros((), device=self._accelerator.device)

    def wait(self) -> None:
        """Wait until every process has called this."""
        self._accelerator.wait_for_everyone()


def agreed(sharding: Sharding | None, value: int) -> int:
    """Return the first process's value in every process. A single process gets its own value."""
    return value if sharding is None else int(sharding.first(value))


def whole_model(sharding: Sharding, model: Any) -> Any | None:
    """Return a plain model with whole weights on the CPU in the first process, and None in the others."""
    from accelerate import init_empty_weights

    weights = {}
    for name, tensor in held(model).items():
        gathered = whole(tensor.detach())
        if sharding.rank == 0:
            weights[name] = gathered.cpu()
    if sharding.rank > 0:
        return None
    # All other buffers follow from the config. Empty weights avoid values that would only be replaced.
    with init_empty_weights(include_buffers=False):
        plain = model_class(model.config)._from_config(model.config, dtype=torch.float32)
    _, unknown = plain.load_state_dict(weights, strict=False, assign=True)
    assert not unknown
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor. An unsharded tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, divided in the same way as `parameter`."""
    if not isinstance(parameter, DTensor) or tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def clip_sharded(sharding: Sharding, parameters: list[nn.Parameter], limit: float) -> float:
    """Scale the gradients to a joint norm of at most `limit`, and return the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(sharding.norm(gradients))
    if norm > limit or not math.isfinite(norm):
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))
    return norm
