"""AdamW with 8-bit states over this process's shards. Any number of processes can load its saved states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autodistill.distillation.training.fsdp import like

# Number of values that share a scale in bitsandbytes.
_BLOCK = 256


def eight_bit_adamw(groups: list[dict[str, Any]], **options: Any) -> Any:
    """Return bitsandbytes' AdamW over whole weights or shards. Each process updates its own part.

    The size of the whole weight decides whether its states have 8 bits, so that all processes agree.

    Args:
        groups: Groups of parameters.
        options: As for `AdamW8bit`.
    """
    from bitsandbytes.optim.adamw import AdamW8bit

    class OverShards(AdamW8bit):
        """AdamW with 8-bit states over this process's shard of each weight."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            """Return the settings of a weight. The size of the whole weight, not of the shard, decides."""
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            size = self.param_groups[gindex]["params"][pindex].numel()
            config["min_8bit_size"] = 0 if size >= config["min_8bit_size"] else size + 1
            return config

        def init_state(self, group: dict[str, Any], p: Any, gindex: int, pindex: int) -> None:
            with self._held(p) as held:
                super().init_state(group, held, gindex, pindex)

        def update_step(self, group: dict[str, Any], p: Any, gindex: int, pindex: int) -> None:
            """Update the shard of a weight. An empty shard only counts the step."""
            with self._held(p) as held:
                if held.numel():
                    super().update_step(group, held, gindex, pindex)
                else:
                    self.state[p]["step"] += 1

        @contextmanager
        def _held(self, p: Any) -> Iterator[Any]:
            """Yield a plain parameter with this process's values and gradient, whose states are found under it."""
            if not isinstance(p, DTensor):
                yield p
                return
            held = nn.Parameter(p.to_local())
            held.grad = None if p.grad is None else p.grad.to_local()  # type: ignore[attr-defined]
            self.state[held] = self.state[p]
            try:
                yield held
            finally:
                del self.state[held]

    return OverShards(groups, **options)


def whole_states(parameter: Tensor, states: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of a whole weight, gathered from all processes. An unsharded weight's states stay as they are.

    Scales of blocks follow one another, process by process, because a block never crosses the end of a shard.
    """
    if not isinstance(parameter, DTensor):
        return dict(states)
    found = {}
    for key, value in states.items():
        if key.startswith("absmax"):
            found[key] = _gathered(value, _blocks(parameter.shape, parameter.device_mesh.size()))
        elif key.startswith("state"):
            mesh, places = parameter.device_mesh, parameter.placements
            sharded = DTensor.from_local(value, mesh, places, shape=parameter.shape, stride=parameter.stride())
            found[key] = sharded.full_tensor()
        else:
            found[key] = value
    return found


def own_states(parameter: Tensor, whole: Mapping[str, Tensor], processes: int) -> dict[str, Any]:
    """Return this process's part of whole states. It is exact if the number of processes has not changed.

    With another number, blocks begin at other values, so the values are rounded to 8 bits once more.

    Args:
        parameter: The weight, sharded or not.
        whole: States as `whole_states` returned them.
        processes: Number of processes that wrote the states, each those of its shard. 1 if each had the whole weight.
    """
    mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
    count, rank = (mesh.size(), mesh.get_local_rank()) if mesh else (1, 0)
    states: dict[str, Any] = {key: value for key, value in whole.items() if key.startswith("qmap")}
    states["step"] = int(whole["step"])
    for number in "12":
        values, scales = whole[f"state{number}"], whole.get(f"absmax{number}")
        if scales is None:
            states[f"state{number}"] = _own(values, parameter)
        elif processes == count:
            states[f"state{number}"] = _own(values, parameter)
            states[f"absmax{number}"] = scales.split(_blocks(parameter.shape, count))[rank].clone()
        else:
            code = whole[f"qmap{number}"]
            own = _own(_values(values, scales, code, processes), parameter)
            states[f"state{number}"], states[f"absmax{number}"] = _rounded(own, code)
    return states


def _own(whole: Tensor, parameter: Tensor) -> Tensor:
    part = like(whole, parameter)
    return part.to_local() if isinstance(part, DTensor) else part


def _values(codes: Tensor, scales: Tensor, code: Tensor, processes: int) -> Tensor:
    """Return the float32 values of codes and scales that were written by `processes` processes."""
    sizes, blocks = _sizes(codes.shape, processes), _blocks(codes.shape, processes)
    parts = zip(codes.flatten().split(sizes), scales.split(blocks), strict=True)
    values = [code[few.long()] * each.repeat_interleave(_BLOCK)[: len(few)] for few, each in parts]
    return torch.cat(values).view(codes.shape)


def _rounded(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 in the shape of the values, and the scales of their blocks."""
    from bitsandbytes.functional import quantize_blockwise

    if values.numel() == 0:
        return values.to(torch.uint8), values.new_zeros(0)
    codes, state = quantize_blockwise(values.contiguous(), code=code, blocksize=_BLOCK)
    return codes, state.absmax


def _sizes(shape: torch.Size, processes: int) -> list[int]:
    """Return the number of values of a weight in each process, as FSDP2 divides its rows."""
    rows = -(-shape[0] // processes)
    held = [max(0, min(rows, shape[0] - rank * rows)) for rank in range(processes)]
    return [count * shape[1:].numel() for count in held]


def _blocks(shape: torch.Size, processes: int) -> list[int]:
    return [-(-size // _BLOCK) for size in _sizes(shape, processes)]


def _gathered(values: Tensor, counts: list[int]) -> Tensor:
    """Return the vectors of all processes, one after the other, without the padding to equal lengths."""
    longest = torch.nn.functional.pad(values, (0, max(counts) - len(values)))
    found = [torch.empty_like(longest) for _ in counts]
    dist.all_gather(found, longest)
    return torch.cat([each[:count] for each, count in zip(found, counts, strict=True)])
