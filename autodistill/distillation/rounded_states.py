"""AdamW whose two moments are held in bfloat16, in half of float32's memory, and rounded at random."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Values whose moments are shown in float32 at once: of a large table these would take more than the states. What a
# core's cache holds is twice as fast there, and a GPU is given enough to do with each kernel. Both are even, since two
# values share a draw.
_A_THREAD, _ON_A_GPU = 2**16, 2**22


class RoundedAdamW(Optimizer):
    """AdamW without decay of weights, over whole weights or shards: of a shard, its process updates what it holds.

    A step computes in float32, and its update is of the new moments before they are rounded. bfloat16 has 8 bits:
    rounded to the nearest, a second moment would stand still while squared gradients are within 4% of it (at a memory
    of 0.95), wherever that is. Rounded at random, up as often as the value lies near the upper of its two neighbours,
    a moment is right in the mean whatever the size of its changes (Gupta et al., 2015, arXiv:1502.02551). The draws are
    a function of a weight's place and steps, so that a continued training is the uninterrupted one to the last bit.

    Args:
        groups: Of float32 parameters.
        lr: Learning rate of groups that name none.
        betas: Memory of the first and the second moment.
        eps: Added to the root of the second one.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._move(parameter, place, group)

    def _move(self, parameter: Any, place: int, group: dict[str, Any]) -> None:
        state, (memory, square_memory) = self.state[parameter], group["betas"]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] = steps = int(state.get("step", 0)) + 1
        rate = group["lr"] / (1 - memory**steps)
        correction = math.sqrt(1 - square_memory**steps)
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        at_once = _A_THREAD * torch.get_num_threads() if parameter.device.type == "cpu" else _ON_A_GPU
        parts = zip(*(_held(tensor).split(at_once) for tensor in tensors), strict=True)
        draws = _draws(parameter, place, steps)
        for values, gradient, first, second in parts:
            mean = first.float().lerp_(gradient, 1 - memory)
            square = second.float().mul_(square_memory).addcmul_(gradient, gradient, value=1 - square_memory)
            values.addcdiv_(mean, square.sqrt().div_(correction).add_(group["eps"]), value=-rate)
            # Of 64 random bits two values take 32 each, and of those a moment half.
            wide = torch.empty(-(-len(values) // 2), dtype=torch.int64, device=values.device)
            bits = wide.random_(-(2**63), None, generator=draws).view(torch.int32)[: len(values)]
            first.copy_(rounded(mean, bits & 0xFFFF))
            second.copy_(rounded(square, (bits >> 16) & 0xFFFF))


def rounded(values: Tensor, draws: Tensor) -> Tensor:
    """Each value as one of its two neighbours in bfloat16, the nearer one the more often.

    Args:
        values: Finite float32; overwritten.
        draws: int32 as they are shaped, evenly distributed over 0 to 2^16 - 1.

    Returns:
        float32, which bfloat16 holds exactly.
    """
    # bfloat16 is the upper half of float32: what the lower half lacks to a carry is the chance of none.
    bits = values.view(torch.int32)
    bits.add_(draws).bitwise_and_(-(2**16))
    return values


def _held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in one row."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()).view(-1)


def _draws(parameter: Tensor, place: int, steps: int) -> torch.Generator:
    rank = parameter.device_mesh.get_local_rank() if isinstance(parameter, DTensor) else 0
    seed = np.random.SeedSequence((steps, place, rank)).generate_state(1)
    return torch.Generator(parameter.device).manual_seed(int(seed[0]))
