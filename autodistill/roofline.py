"""How fast a device would serve a model, by its bytes and operations against bandwidth and rate: always predicted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autodistill.contracts import ModelSpec
from autodistill.devices import Device
from autodistill.formats import Role, TensorSpec, tensor_bytes, weights_bytes
from autodistill.serving_memory import kv_bytes
from autodistill.strategy import Deployment
from autodistill.units import LatencyLimit

PROMPT_TOKENS = 512
"""Of the prompt whose time to the first token is predicted, where none is given."""

_EXPERTS = ".experts."
_PLAIN = ("cpu", "board", "phone")  # classes whose runtimes compute in float32 where no faster 16 bits are stated


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A prediction with its band.

    Attributes:
        tokens_per_second: Of all streams together.
        tokens_per_second_low, tokens_per_second_high: The band, from the lowest and highest efficiency of the class.
        decode_ms, decode_ms_high: Time of a token after the first, typical and at the slow end of the band.
        time_to_first_token_ms, time_to_first_token_ms_high: Of one prompt, typical and at the slow end.
        prompt: Tokens of that prompt.
        bound: What decoding waits for: "bandwidth", "compute" or "launches".
        source: Always "predicted".
    """

    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    decode_ms: float
    decode_ms_high: float
    time_to_first_token_ms: float
    time_to_first_token_ms_high: float
    prompt: int
    bound: str
    source: str = "predicted"

    def to_json(self) -> dict[str, Any]:
        """The prediction as plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step over some tokens reads and computes.

    Attributes:
        bytes: Of weights and of keys and values.
        operations: A multiply-add is two.
    """

    bytes: float
    operations: float


def speed(
    spec: ModelSpec,
    deployment: Deployment,
    device: Device,
    *,
    context: int,
    batch: int = 1,
    prompt: int | None = None,
    kv_type: str = "f16",
    weights: int | None = None,
) -> Speed:
    """Predicts decoding at a full context, and the time to the first token of a prompt.

    A decoding step takes the longer of reading its bytes and computing, plus a cost for each layer; a prompt likewise
    (Williams et al. 2009, Roofline). The shares of bandwidth and rate that are reached are those of the device's class.

    Args:
        spec, deployment: The model and its packing.
        device: What serves it.
        context: Tokens that each stream has behind it.
        batch: Streams decoded at once.
        prompt: Tokens of the prompt; the lesser of 512 and the context by default.
        kv_type, weights: As `serving_memory.memory` takes them.
    """
    prompt = min(prompt or PROMPT_TOKENS, context)
    step = work(spec, deployment, tokens=batch, sequences=batch, behind=context, kv_type=kv_type, weights=weights)
    read = work(spec, deployment, tokens=prompt, sequences=1, behind=prompt / 2, kv_type=kv_type, weights=weights)
    kind = device.kind
    preferred = ("fp32", "fp16") if kind.name in _PLAIN else ("bf16", "fp16")
    rate = device.rate(*preferred)
    launches = spec.layers * kind.layer_seconds
    integers = deployment.runtime == "llama.cpp" and deployment.bits < 16
    shares = kind.prefill_quantized if integers else kind.prefill

    def seconds(done: Work, decode: float, prefill: float) -> float:
        return max(done.bytes / (device.bandwidth * decode), done.operations / (rate * prefill)) + launches

    slow, typical, fast = (
        seconds(step, getattr(kind.decode, end), getattr(shares, end)) for end in ("low", "typical", "high")
    )
    first, first_slow = (seconds(read, getattr(kind.decode, end), getattr(shares, end)) for end in ("typical", "low"))
    reading = step.bytes / (device.bandwidth * kind.decode.typical)
    computing = step.operations / (rate * shares.typical)
    waits = {"bandwidth": reading, "compute": computing, "launches": launches}
    return Speed(
        tokens_per_second=batch / typical,
        tokens_per_second_low=batch / slow,
        tokens_per_second_high=batch / fast,
        decode_ms=1e3 * typical,
        decode_ms_high=1e3 * slow,
        time_to_first_token_ms=1e3 * first,
        time_to_first_token_ms_high=1e3 * first_slow,
        prompt=prompt,
        bound=max(waits, key=lambda name: waits[name]),
    )


def limit_seconds(
    spec: ModelSpec, deployment: Deployment, device: Device, limit: LatencyLimit, *, context: int
) -> float:
    """Seconds that are held against a limit of latency.

    No percentile can be predicted: one above the median is the slow end of the band. The first token is that of the
    last of so many prompts that arrive at once.

    Args:
        spec, deployment, device: As `speed` takes them.
        limit: Quantity, percentile and streams.
        context: Tokens that each stream has behind it.
    """
    found = speed(spec, deployment, device, context=context, batch=limit.streams)
    if limit.quantity == "tpot":
        return (found.decode_ms_high if limit.percentile > 50 else found.decode_ms) / 1e3
    first = found.time_to_first_token_ms_high if limit.percentile > 50 else found.time_to_first_token_ms
    return limit.streams * first / 1e3


def work(
    spec: ModelSpec,
    deployment: Deployment,
    *,
    tokens: int,
    sequences: int,
    behind: float,
    kv_type: str = "f16",
    weights: int | None = None,
) -> Work:
    """Bytes and operations of one pass over `tokens` tokens in all of `sequences`, each with `behind` tokens before it.

    Weights are read once a pass, those of experts as far as the tokens are likely to take them; an embedding table that
    is not also the head is not read. Logits are of one token a sequence.
    """
    dense = deployment.runtime == "transformers" and deployment.container == "compressed-tensors"
    chosen = spec.active_experts / spec.experts if spec.experts else 1.0
    met = 1 - (1 - chosen) ** tokens if chosen < 1 else 1.0
    read = multiplied = head = 0.0
    # Which tensors are kept off the grid goes by their names; else those of a kind are stored alike.
    tensors = [(tensor, 1) for tensor in spec.tensors] if deployment.keep else spec.kinds
    for tensor, times in tensors:
        table = tensor.role is Role.EMBEDDING
        if len(tensor.shape) < 2 or (table and not spec.tied):
            continue
        expert = _EXPERTS in tensor.name
        count = times * _count(tensor)
        size = 2 * count if dense else times * tensor_bytes(tensor, deployment.storage(tensor))
        read += size * (met if expert else 1)
        if table or tensor.role is Role.HEAD:
            head += count
        else:
            multiplied += count * (chosen if expert else 1)
    if weights is not None:
        read *= weights / weights_bytes(spec.tensors, deployment)
    seen = min(behind, spec.window) if spec.window else behind
    wide, narrow = spec.layers - spec.windowed_layers, spec.windowed_layers
    cache = sequences * (kv_bytes(spec, wide, int(behind), kv_type) + kv_bytes(spec, narrow, int(seen), kv_type))
    attended = 4 * tokens * spec.heads * spec.head_dim * (wide * behind + narrow * seen)
    return Work(bytes=read + cache, operations=2 * (tokens * multiplied + sequences * head) + attended)


def _count(tensor: TensorSpec) -> int:
    rows, columns = tensor.shape
    return rows * columns
