"""What `quantization` does on a CPU, in loops compiled by numba: each file those of the module of its name."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.int8, torch.bool)


def loops(name: str, *tensors: Tensor | None) -> ModuleType | None:
    """Return the compiled loops of a module of this name, imported on first use, where they can handle tensors.

    None where numba does not work here, or a tensor is not on a CPU, not contiguous, or neither float32 nor bfloat16,
    codes or a mask: all is then done operation by operation.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    handled = all(one.device.type == "cpu" and one.is_contiguous() and one.dtype in _TYPES for one in given)
    return _imported(name) if handled else None


@cache
def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        return None
