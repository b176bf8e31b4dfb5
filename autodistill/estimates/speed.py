"""Predicted speed of a served model on a device: a roofline of bytes against bandwidth and operations against rate."""

from __future__ import annotations

from dataclasses import dataclass

from autodistill.estimates.activations import all_activation_rows, cached_bytes, is_further_table, window_in
from autodistill.hardware.budget import LatencyLimit
from autodistill.hardware.device import Device
from autodistill.hardware.runtime import Shares
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec, is_expert
from autodistill.quantization.formats import as_held, get_format, storage_bytes, tensor_bytes
from autodistill.quantization.grids import Grid, Storage
from autodistill.strategy.deployment import Deployment
from autodistill.utils.plain_dataclass import ToJson

PROMPT_TOKENS = 512
"""Tokens of the prompt for which the time to the first token is predicted, unless another length is given."""

# llama.cpp has CPU kernels for these that rearrange rows, or kernels that are as fast (benchmarks/engine/k_quants.py).
_FAST_KERNELS = ("gguf-q4_0", "gguf-q8_0", "gguf-q6_k", "gguf-q5_k", "gguf-q4_k", "gguf-q3_k", "gguf-q2_k")
_PLAIN_KERNEL = 0.6  # share of that rate on other grids: Q5_0's, measured where the shares were measured
_FLOAT32 = ("cpu", "board", "phone")  # classes whose runtimes compute in float32 unless a faster 16-bit rate is stated


@dataclass(frozen=True, kw_only=True)
class SpeedEstimate(ToJson):
    """A predicted speed with its band.

    Attributes:
        tokens_per_second: Total over all streams.
        tokens_per_second_low, tokens_per_second_high: The band, from the lowest and highest efficiency of the runtime
            on such a device.
        decode_ms, decode_ms_high: Time of a token after the first, typical and at the slow end of the band.
        time_to_first_token_ms, time_to_first_token_ms_high: Time for one prompt, typical and at the slow end.
        prompt: Tokens of that prompt.
        bound: What decoding waits for: "bandwidth", "compute" or "launches".
        source: Always "predicted".
        assumed: Why the efficiencies are assumed and the band is wide, or None if they were measured.
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
    assumed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """The bytes that a step reads and the operations that it computes.

    Attributes:
        bytes: Bytes of weights and of keys and values.
        operations: All operations; a multiply-add counts as two.
        attended: Operations of attention alone.
        plain: Operations with linear weights on a grid without fast kernels, whatever the format is named after.
        activations: Bytes of the activations that pass between products, in 16 bits.
    """

    bytes: float
    operations: float
    attended: float
    plain: float
    activations: float


def speed(
    spec: ModelSpec,
    deployment: Deployment,
    device: Device,
    *,
    context: int,
    batch: int = 1,
    prompt: int | None = None,
    kv_type: str | None = None,
    weights: int | None = None,
) -> SpeedEstimate:
    """Predict decoding at a full context, and the time to the first token of a prompt.

    A decoding step takes the longer of reading its bytes and computing, plus a cost for each layer. The same rule holds
    for a prompt (Williams et al. 2009, Roofline). On a CPU, unpacking and attention are added. The shares of bandwidth
    and rate that are reached are those of the runtime on the device's class.

    Args:
        spec, deployment: The model and its packing.
        device: The device that serves it.
        context: Tokens of context in each stream.
        batch: Number of streams decoded at once.
        prompt: Tokens of the prompt; by default 512, or the context if that is less.
        kv_type, weights: As for `serving_memory.memory`.
    """
    prompt = min(prompt or PROMPT_TOKENS, context)
    step = _step(spec, deployment, context, batch, kv_type, weights)
    read = _read(spec, deployment, prompt, kv_type, weights)
    costs = {end: _step_costs(spec, deployment, device, end, step) for end in ("low", "typical", "high")}
    slow, typical, fast = (sum(costs[end].values()) for end in ("low", "typical", "high"))
    first, first_slow = (_prompt_seconds(spec, deployment, device, end, read) for end in ("typical", "low"))
    return SpeedEstimate(
        tokens_per_second=batch / typical,
        tokens_per_second_low=batch / slow,
        tokens_per_second_high=batch / fast,
        decode_ms=1e3 * typical,
        decode_ms_high=1e3 * slow,
        time_to_first_token_ms=1e3 * first,
        time_to_first_token_ms_high=1e3 * first_slow,
        prompt=prompt,
        bound=max(costs["typical"], key=lambda name: costs["typical"][name]),
        assumed=device.shares(deployment.runtime).assumed or None,
    )


def _step(
    spec: ModelSpec,
    deployment: Deployment,
    context: int,
    batch: int,
    kv_type: str | None = None,
    weights: int | None = None,
) -> Work:
    return work(spec, deployment, tokens=batch, sequences=batch, behind=context, kv_type=kv_type, weights=weights)


def _read(
    spec: ModelSpec, deployment: Deployment, prompt: int, kv_type: str | None = None, weights: int | None = None
) -> Work:
    """Return the work of reading a prompt. On average a token attends to half of the prompt."""
    return work(spec, deployment, tokens=prompt, sequences=1, behind=prompt / 2, kv_type=kv_type, weights=weights)


def _step_costs(spec: ModelSpec, deployment: Deployment, device: Device, end: str, step: Work) -> dict[str, float]:
    """Return the seconds of a decoding step by cause, at one end of the runtime's shares.

    A GPU computes while it reads, so the longer of the two counts. A CPU core that multiplies by weights on a grid
    unpacks them between its loads. So products are added to reading, at the rate of the integer units. Attention is
    added as well: it handles one query at a time, which leaves most of a core idle.
    """
    shares, rate = device.shares(deployment.runtime), _rate(device)
    reading = step.bytes / _bandwidth(device, shares, end)
    products = step.operations if shares.attention is None else step.operations - step.attended
    plain = _slow_operations(deployment, step, products)
    # With many streams the products are like a prompt's, which no longer wait for loads.
    computing = max(0.0, _product_seconds(device, shares, end, products, plain) - reading)
    if shares.dequantize is not None and deployment.bits < 16:
        unpacked = rate * getattr(shares.dequantize, end)
        slowly = rate * _PLAIN_KERNEL * getattr(shares.dequantize, end)
        computing = max((products - plain) / unpacked + plain / slowly, computing)
    if shares.attention is not None:
        computing += step.attended / (rate * getattr(shares.attention, end))
    launches = _launches(spec, shares, end, reading + computing)
    return {"bandwidth": reading, "compute": computing, "launches": launches}


def _prompt_seconds(spec: ModelSpec, deployment: Deployment, device: Device, end: str, read: Work) -> float:
    shares = device.shares(deployment.runtime)
    plain = _slow_operations(deployment, read, read.operations)
    computing = _product_seconds(device, shares, end, read.operations, plain)
    if shares.activations is not None:
        computing += read.activations / (device.bandwidth * getattr(shares.activations, end))
    working = max(read.bytes / _bandwidth(device, shares, end), computing)
    return float(working + _launches(spec, shares, end, working))


def _launches(spec: ModelSpec, shares: Shares, end: str, working: float) -> float:
    """Return the seconds that layers cost in addition to reading and computing."""
    cost = spec.layers * shares.layer(end)
    return max(0.0, cost - working) if shares.ahead else cost


def _bandwidth(device: Device, shares: Shares, end: str) -> float:
    """Return the bytes per second that the runtime reaches; it reaches a measured bandwidth by definition."""
    return float(device.bandwidth * getattr(shares.decode_measured if device.measured else shares.decode, end))


def _rate(device: Device) -> float:
    return device.rate(*(("fp32", "fp16") if device.kind.name in _FLOAT32 else ("bf16", "fp16")))


def _slow_operations(deployment: Deployment, work: Work, operations: float) -> float:
    """Return the number of operations in some work that have no fast kernels.

    The formats' shares were found with all operations counted alike, at the speed of the format's own kernels. Only
    K-quants have linear weights on another grid than the one in their name. Those weights count at the speed of that
    other grid.
    """
    return work.plain if _is_fast(deployment.linear) else operations


def _is_fast(stored: Storage) -> bool:
    return isinstance(stored, Grid) and stored.name in _FAST_KERNELS


def _product_seconds(device: Device, shares: Shares, end: str, operations: float, plain: float) -> float:
    """Return the seconds of a prompt's matrix products, at one end of the runtime's shares.

    Args:
        device, shares, end: The device, the runtime's shares on it, and the end of their range.
        operations: Number of all operations.
        plain: Number of operations without fast kernels.
    """
    rate = device.rates.get(shares.rate) or _rate(device)
    fast, slow = (rate * getattr(share, end) for share in (shares.prefill_quantized, shares.prefill))
    return float((operations - plain) / fast + plain / slow)


def limit_seconds(
    spec: ModelSpec, deployment: Deployment, device: Device, limit: LatencyLimit, *, context: int
) -> float:
    """Return the predicted seconds that are compared with a latency limit.

    Percentiles cannot be predicted, so a percentile above the median is the slow end of the band. The time to the first
    token assumes that one prompt a stream arrives at the same time, and is that of the last prompt.

    Args:
        spec, deployment, device: As for `speed`.
        limit: Quantity, percentile and streams.
        context: Tokens of context in each stream.
    """
    end = "low" if limit.percentile > 50 else "typical"
    if limit.quantity == "tpot":
        step = _step(spec, deployment, context, limit.streams)
        return sum(_step_costs(spec, deployment, device, end, step).values())
    read = _read(spec, deployment, min(PROMPT_TOKENS, context))
    return limit.streams * _prompt_seconds(spec, deployment, device, end, read)


def work(
    spec: ModelSpec,
    deployment: Deployment,
    *,
    tokens: int,
    sequences: int,
    behind: float,
    kv_type: str | None = None,
    weights: int | None = None,
) -> Work:
    """Return the work of a pass over `tokens` tokens in `sequences` sequences, each after `behind` tokens.

    Weights are read once a pass. Those of experts are counted by the probability that a token uses them. An embedding
    table that is not also the head is not read. Logits are computed for one token a sequence.
    """
    spec = as_held(spec, deployment)
    dense = deployment.runtime in get_format(deployment.format).dense_in
    chosen = spec.active_experts / spec.experts if spec.experts else 1.0
    met = 1 - (1 - chosen) ** tokens
    read = multiplied = head = plain = 0.0
    # If storage goes by name, take each tensor; otherwise all tensors of a kind are stored alike.
    tensors = [(tensor, 1) for tensor in spec.tensors] if deployment.by_name else spec.kinds
    for tensor, times in tensors:
        table = tensor.role is Role.EMBEDDING
        if len(tensor.shape) < 2 or (table and (not spec.tied or is_further_table(tensor, spec))):
            continue
        expert = is_expert(tensor.name)
        count = times * _count(tensor)
        stored: Storage = "bf16" if dense else deployment.storage(tensor)
        read += times * tensor_bytes(tensor, stored) * (met if expert else 1)
        if table or tensor.role is Role.HEAD:
            head += count
            continue
        taken = count * (chosen if expert else 1)
        multiplied += taken
        if isinstance(stored, Grid) and not _is_fast(stored):
            plain += taken
    weights = weights if weights is not None else deployment.known_bytes or None
    # The stored bytes say nothing about weights that the runtime holds in 16 bits.
    if weights is not None and not dense:
        read *= weights / storage_bytes(spec.tensors, deployment)
    window, narrow = window_in(spec, deployment.runtime)
    seen, wide = min(behind, window), spec.layers - narrow
    kinds = deployment.cache_types if kv_type is None else (kv_type, kv_type)
    cache = cached_bytes(spec, deployment.runtime, int(behind), int(seen), kinds) + 2 * 4 * spec.recurrent
    cache *= sequences
    attended = 4 * tokens * spec.heads * spec.head_dim * (wide * behind + narrow * seen)
    products = 2 * (tokens * multiplied + sequences * head)
    return Work(
        bytes=read + cache,
        operations=products + attended,
        attended=attended,
        plain=2 * tokens * plain,
        activations=2 * tokens * all_activation_rows(spec),
    )


def _count(tensor: TensorSpec) -> int:
    rows, columns = tensor.shape
    return rows * columns
