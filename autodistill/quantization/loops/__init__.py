"""Loops that numba compiles for `quantization` on a CPU. Each file serves the module of the same name."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.int8, torch.bool)


def loops(name: str, *tensors: Tensor | None) -> ModuleType | None:
    """Return the compiled loops for the module `name`, imported on first use, if they can handle the tensors.

    They can handle contiguous tensors on a CPU in float32, bfloat16, int8 (codes) or bool (masks). For other tensors,
    or if numba does not work here, the result is None, and the caller does everything operation by operation.
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
