"""What a described model takes and how fast it would run, in one deployment, on one or all devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from autodistill.described import Described
from autodistill.devices import Device
from autodistill.errors import InputError
from autodistill.roofline import speed
from autodistill.serving_memory import BASIS, memory
from autodistill.strategy import Deployment

_CONTEXT = 2048  # that of a search's budget


def appraise(
    model: Described,
    deployment: Deployment,
    *,
    context: int | None = None,
    batch: int = 1,
    kv_type: str = "f16",
    runtime: str | None = None,
    prompt: int | None = None,
    devices: Sequence[Device] = (),
) -> dict[str, Any]:
    """Memory by parts, and for each device whether it fits and how fast it would be.

    Args:
        model: What is served.
        deployment: How; a GGUF file's own tensors count where the model has them.
        context: Tokens of each sequence; 2048 by default, or the model's if that is less.
        batch, kv_type, runtime, prompt: As `memory` and `speed` take them.
        devices: One, whose speed is then the document's own, or several.

    Returns:
        Plain data: the parts of the memory and their sum, runtime, context, batch, `tokens_per_second` and
        `time_to_first_token_ms` (None without a device), and the devices.

    Raises:
        InputError: As `memory`, or a context beyond the model's.
    """
    spec = model.spec
    context = min(_CONTEXT, spec.max_context) if context is None else context
    if context > spec.max_context:
        raise InputError(f"{model.name} has a context of {spec.max_context} tokens: lower --context {context}")
    if prompt is not None and not 1 <= prompt <= context:
        raise InputError(f"--prompt must be 1 to the context of {context}, not {prompt}")
    need = memory(
        spec,
        deployment,
        context=context,
        batch=batch,
        kv_type=kv_type,
        weights=model.weights_bytes,
        runtime=runtime,
    )
    rows = []
    for device in devices:
        fast = speed(
            spec,
            deployment,
            device,
            context=context,
            batch=batch,
            prompt=prompt,
            kv_type=kv_type,
            weights=model.weights_bytes,
        )
        fits = need.total_bytes <= device.usable_bytes
        rows.append({"device": device.name, "fits": fits, "usable_bytes": device.usable_bytes, **fast.to_json()})
    one = rows[0] if len(rows) == 1 else {}
    return {
        "model": model.name,
        "parameters": spec.parameters,
        "deployment": "as stored" if model.weights_bytes is not None else deployment.name,
        **asdict(need),
        "total_bytes": need.total_bytes,
        "kv_type": kv_type,
        "basis": BASIS[need.runtime],
        "source": "predicted",
        "tokens_per_second": one.get("tokens_per_second"),
        "time_to_first_token_ms": one.get("time_to_first_token_ms"),
        "devices": rows,
    }
