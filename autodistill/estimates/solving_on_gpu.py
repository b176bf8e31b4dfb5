"""The time of solving on a GPU that is not here, predicted from the GPU's data sheet. Loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from autodistill.errors import InputError
from autodistill.estimates.solving import SolvingWork
from autodistill.hardware.device import Device

FILE_BYTES = 2
"""Bytes of a weight in the teacher's files: most are in 16 bits."""

FILE_RATES: Mapping[str, float] = MappingProxyType({"low": 1e9, "typical": 3e9})
"""Bytes per second at which files are read, assumed: of a slow and of a usual NVMe disk. The disk is not known."""

ROUNDING: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "f16": (12, 2),
        "bf16": (12, 2),
        "q8_0": (87, 21),
        "q6_k": (608, 170),
        "q5_1": (2609, 774),
        "q5_0": (2966, 757),
        "q5_k": (3758, 1266),
        "q4_1": (2609, 774),
        "iq4_nl": (6671, 1286),
        "q4_0": (2966, 757),
        "q4_k": (3758, 1266),
        "mxfp4": (1060, 228),
        "q3_k": (3821, 939),
        "q2_k": (3971, 1247),
        "int8": (86, 21),
        "int4": (3006, 827),
    }
)
"""The bytes that rounding moves for each weight, and the operations of torch that it starts for each chunk, by type.

They were counted, and a test counts them again. Integers in larger groups or whole rows have those of groups of 32.
"""

_CHUNK = 2**24  # most weights that are rounded at once on a GPU
_LAYER_OPERATIONS = 41  # operations of torch in the forward pass of a layer of Llama, counted in the same way


def check_solves_on(device: Device, scoring: str) -> None:
    """Refuse a device on which the time of solving cannot be predicted.

    Args:
        device: The device on which solving would run.
        scoring: Precision of products when text is scored.

    Raises:
        InputError: It is no GPU with memory of its own, or its rate in this precision is not known.
    """
    if not device.discrete:
        raise InputError(
            f"--solve-on predicts for GPUs with memory of their own, and {device.name} is none: name a GPU"
        )
    if scoring == "tf32":
        raise InputError("--scoring tf32: the table of devices has no rates of TF32; leave --scoring or --solve-on out")
    if _precision(scoring) not in device.rates:
        raise InputError(
            f"the table of devices has no {_precision(scoring)} rate of {device.name}: describe it with --devices FILE"
        )


def seconds_on(work: SolvingWork, device: Device, scoring: str, length: int, end: str) -> dict[str, float]:
    """Predict the seconds of solving by part: products, rounding, and reading files.

    Products reach the share of the device's rate that transformers reaches when it reads a prompt, and rounding the
    share of its bandwidth that transformers reaches when it decodes. A step takes as long as torch needs to start its
    operations, if that is longer. All types are rounded operation by operation: on a GPU no loops are compiled.

    Args:
        work: The work.
        device: A device that `check_solves_on` accepts.
        scoring: Precision of products when text is scored.
        length: Tokens of a sequence. Each counts as a pass of its own, though some passes read several.
        end: "typical", or "low" for the slow end of the shares.
    """
    shares = device.shares("transformers")
    rate = device.rates[_precision(scoring)] * getattr(shares.prefill, end)
    bandwidth = device.bandwidth * getattr(shares.decode, end)
    layer = shares.layer(end)
    at_once = max(1, min(work.matrix, _CHUNK))
    rounding = 0.0
    for kind, count in work.rounded.items():
        moved, started = ROUNDING[kind.partition("-")[0]]
        rounding += count * max(moved / bandwidth, started * layer / _LAYER_OPERATIONS / at_once)
    return {
        "products": max(sum(work.operations.values()) / rate, work.tokens_run / length * layer),
        "rounding": rounding,
        "reading": work.readings * FILE_BYTES * work.weights / FILE_RATES[end],
    }


def _precision(scoring: str) -> str:
    return "bf16" if scoring == "bf16" else "fp32"
