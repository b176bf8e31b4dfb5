"""AdamW with both moments in bfloat16, which takes half the memory of float32. Moments are rounded at random."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Number of values whose moments are in float32 at a time. For a whole large table, these would take more memory than
# the states. On a CPU, values that fit a core's cache are twice as fast. On a GPU, each kernel needs enough work. Both
# numbers are even, since two values share a draw.
_VALUES_PER_THREAD, _VALUES_ON_GPU = 2**16, 2**22
_MOMENTS = ("exp_avg", "exp_avg_sq")
_EPS = 1e-8  # is added to the root of the second moment


class RoundedAdamW(Optimizer):
    """AdamW without weight decay, over whole weights or shards. Each process updates its own part.

    A step computes in float32, and its update uses the new moments before they are rounded. bfloat16 has 8 significant
    bits. With rounding to the nearest, a second moment would not change while squared gradients are within 4% of it (at
    a memory of 0.95).
    With random rounding, the chance to round up grows with the distance from the lower neighbour. A moment is then
    right on average, however small its changes are (Gupta et al., 2015, arXiv:1502.02551). The draws depend only on a
    weight's place and its steps, so a continued training equals the uninterrupted one to the last bit.

    Args:
        groups: Groups of contiguous float32 parameters.
        lr: Learning rate of groups that name none.
        betas: Memory of the first and the second moment.

    Raises:
        ValueError: A parameter has another type, or is not contiguous.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the same requirements as the first."""
        super().add_param_group(param_group)
        # Parameters are updated in place through a flat view, some values at a time.
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype != torch.float32 or not _local(parameter).is_contiguous():
                raise ValueError(
                    f"moments of 16 bits are for contiguous float32 parameters, and one of {tuple(parameter.shape)} is "
                    f"{parameter.dtype} with strides {parameter.stride()}"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Float32 moments of another AdamW are rounded to the nearest bfloat16."""
        super().load_state_dict(state_dict)
        # torch casts every state to the parameter's type, float32, which keeps the values of bfloat16 moments.
        for state in self.state.values():
            state |= {name: state[name].bfloat16() for name in _MOMENTS if name in state}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._move(parameter, place, group)

    def _move(self, parameter: Any, place: int, group: dict[str, Any]) -> None:
        state, (memory, square_memory) = self.state[parameter], group["betas"]
        if not state:
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] = steps = int(state.get("step", 0)) + 1
        rate = group["lr"] / (1 - memory**steps)
        correction = math.sqrt(1 - square_memory**steps)
        moved = [_local(tensor).view(-1) for tensor in (parameter, *(state[name] for name in _MOMENTS))]
        # Gradients are only read, so they need not be contiguous.
        gradients = _local(parameter.grad).reshape(-1)
        at_once = _VALUES_PER_THREAD * torch.get_num_threads() if parameter.device.type == "cpu" else _VALUES_ON_GPU
        parts = zip(*(row.split(at_once) for row in (moved[0], gradients, *moved[1:])), strict=True)
        draws = _draws(parameter, place, steps)
        for values, gradient, first, second in parts:
            mean = first.float().lerp_(gradient, 1 - memory)
            square = second.float().mul_(square_memory).addcmul_(gradient, gradient, value=1 - square_memory)
            values.addcdiv_(mean, square.sqrt().div_(correction).add_(_EPS), value=-rate)
            # 64 random bits serve two values with 32 bits each, 16 for each of the two moments.
            wide = torch.empty(-(-len(values) // 2), dtype=torch.int64, device=values.device)
            bits = wide.random_(-(2**63), None, generator=draws).view(torch.int32)[: len(values)]
            first.copy_(rounded(mean, bits & 0xFFFF))
            second.copy_(rounded(square, (bits >> 16) & 0xFFFF))


def rounded(values: Tensor, draws: Tensor) -> Tensor:
    """Round each value at random to one of its two neighbours in bfloat16, the nearer one more often.

    Args:
        values: Finite float32 values, which are overwritten.
        draws: int32 in the shape of `values`, uniform over 0 to 2^16 - 1.

    Returns:
        float32 values that bfloat16 represents exactly.
    """
    # bfloat16 is the upper half of float32. The lower half plus a draw carries with a probability of lower half / 2^16.
    bits = values.view(torch.int32)
    bits.add_(draws).bitwise_and_(-(2**16))
    return values


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _draws(parameter: Tensor, place: int, steps: int) -> torch.Generator:
    rank = parameter.device_mesh.get_local_rank() if isinstance(parameter, DTensor) else 0
    seed = np.random.SeedSequence((steps, place, rank)).generate_state(1)
    return torch.Generator(parameter.device).manual_seed(int(seed[0]))
