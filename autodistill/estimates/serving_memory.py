"""Predicted memory of a served model, by parts, for each runtime, of a process or of a GPU. Loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from autodistill.errors import InputError
from autodistill.estimates.activations import (
    activation_rows,
    active_ffn,
    cached_bytes,
    fused_rows,
    gated,
    is_further_table,
    kv_bytes,
    latent_attention,
    recurrent_rows,
    rows_by_layer,
    window_in,
)
from autodistill.hardware.runtime import further_runtime, further_runtimes
from autodistill.models.families import graph_named
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec, tensors_of
from autodistill.quantization.formats import CACHE_BYTES, TYPES, as_held, get_format, tensor_bytes, weights_bytes
from autodistill.quantization.grids import Grid, Storage
from autodistill.strategy.deployment import Deployment

_UBATCH = 512  # llama.cpp's n_ubatch: the most tokens that one of its graphs works on
_CACHE_CELLS = 256  # llama.cpp rounds a sequence's context up to a multiple of this
_INPUT_BYTES = 40  # a token's id, position, cache slots and output index in llama.cpp's graph, padding included
_VLLM_BLOCK = 16  # tokens of a page of vLLM's KV cache
_VLLM_BATCHED_TOKENS = 2048  # vLLM's default max_num_batched_tokens, for which a step's activations are allocated

REPACKED = ("q4_0", "q4_k", "iq4_nl", "mxfp4")
"""Types whose matrices llama.cpp's kernels for x86-64 multiply with interleaved rows (read off its log; other CPUs may
interleave other types)."""
STEPS_BYTES: Mapping[str, int] = {"qwen35": 52_200}
"""Graphs of llama.cpp that list 40 steps for each token of a pass, with the process's bytes for a token (measured)."""
HEAD_APART = ("gemma4",)
"""Graphs of llama.cpp that load a tied table a second time for the head, whatever its type (read off its log)."""
_INTERLEAVED = 8  # rows; a table with another number of rows is not interleaved
LLAMA_CPP_PROCESS_BYTES = 20 * 2**20
"""Resident bytes of a llama.cpp process beyond its buffers: code, threads and server (measured, xllamacpp on Linux
x86-64)."""
LLAMA_CPP_VOCABULARY_BYTES = 512
"""Resident bytes of llama.cpp's tables for one entry of the vocabulary, merges included (measured, 49,152 entries)."""
TRAINING_PROCESS_BYTES = 540 * 10**6
"""Resident memory of a process that has imported torch and transformers, and compiled the loops that put weights on a
grid (measured, CPU build of torch 2.13, numba 0.68)."""
TRANSFORMERS_SERVING_BYTES = 427 * 10**6
"""The same for a process that has run a model of nearly nothing, without those loops (measured in the same way)."""
TRANSFORMERS_HOLES = 0.5
"""Holes in glibc's heap, as a share of the cache and a pass's activations (measured). Keys and values stay where they
were first put, between activations that were freed. The next layer's keys and values are larger and do not fit there.
With a fixed mmap threshold, which gives each tensor pages of its own, the peak is the sum of what is in use."""
VLLM_GRAPHS_BYTES = 400 * 10**6
"""vLLM's captured graphs: 0.21 GiB for a model of 1B (vLLM pull 11349), 0.36 GiB for a larger one (gpustack/runner pull
251); not measured here."""
VLLM_PROCESS_BYTES = VLLM_GRAPHS_BYTES + 600 * 10**6
"""The same with CUDA's context and driver, which count if no device is named whose usable memory excludes them."""
CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""GPU memory that cuBLAS works in. Its documentation says 32 MiB from Hopper on and 4 MiB before; torch takes 8.1 MiB
before Hopper (pytorch pull 120925; discuss.pytorch.org/t/178671)."""
TORCH_SEGMENT_BYTES = 20 * 2**20
"""GPU memory that torch's allocator takes at once for tensors of 1 to 10 MiB (c10/cuda/CUDACachingAllocator). Up to one
such segment is unused."""
ONNX_PROCESS_BYTES = 62 * 10**6
"""Resident memory of a process once ONNX Runtime has run a model of nearly nothing (measured, onnxruntime 1.32)."""
ONNX_LAYER_BYTES = 120_000
"""Resident bytes of a layer's nodes in ONNX Runtime (measured in the same way: 30 layers compared with one)."""

BASIS: Mapping[str, str] = {
    "llama.cpp": "buffers as llama.cpp's own log states them on a CPU; the process's overhead measured on Linux x86-64",
    "transformers": "the peak of a process on a CPU (benchmark memory_estimate): activations counted by module, "
    "and the heap's holes",
    "vllm": "predicted: packed weights, pages of cache and a step's activations by vLLM's defaults; not measured",
    "onnxruntime": "the peak of a process that reads prompts on a CPU (benchmark memory_estimate), of our own graphs: "
    "codes as they are stored, activations and cache in float32",
}
"""The basis of a runtime's figures."""

_NOT_ON_GPUS = "predicted, not measured on a GPU: "
BASIS_ON_GPU: Mapping[str, str] = {
    "llama.cpp": (
        f"{_NOT_ON_GPUS}weights except the table that tokens are looked up in, cache and graph as on a CPU, 16-bit "
        "copies of activations, and cuBLAS's workspace"
    ),
    "transformers": f"{_NOT_ON_GPUS}activations counted by module, cuBLAS's workspace, a segment of torch's allocator",
    "vllm": f"{_NOT_ON_GPUS}packed weights, pages of cache and a step's activations by vLLM's defaults, graphs and "
    "cuBLAS's workspace",
    "onnxruntime": f"{_NOT_ON_GPUS}as on a CPU, in float32, without the process",
}
"""The same for the memory of a discrete GPU, whose usable memory excludes the context and the driver."""


def basis_of(runtime: str, *, on_gpu: bool) -> str:
    """Return the basis of a runtime's figures, for the memory of a process or of a discrete GPU."""
    if runtime not in BASIS:
        return further_runtime(runtime).basis
    return (BASIS_ON_GPU if on_gpu else BASIS)[runtime]


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory of inference by parts, in bytes, of the process or of a discrete GPU.

    Attributes:
        weights_bytes: The packed weights as the runtime holds them.
        kv_cache_bytes: Keys and values of `batch` sequences of `context` tokens.
        compute_bytes: Activations and logits.
        overhead_bytes: All other memory of the process, including second copies of weights; on a GPU, the memory that
            libraries work in.
        runtime: The engine.
        context, batch: Tokens of each sequence, and number of sequences at once.
        on_gpu: Whether the figures are of a discrete GPU's memory. They exclude CUDA's context, because a device's
            usable memory excludes it too.
        main_memory_bytes: For a GPU, the memory that the process takes of the machine. No limit applies to it.
    """

    weights_bytes: int
    kv_cache_bytes: int
    compute_bytes: int
    overhead_bytes: int
    runtime: str
    context: int
    batch: int
    on_gpu: bool = False
    main_memory_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of the parts, which is compared with a memory limit."""
        return self.weights_bytes + self.kv_cache_bytes + self.compute_bytes + self.overhead_bytes


@dataclass(frozen=True, kw_only=True)
class _Serving:
    """A served model and its load."""

    spec: ModelSpec
    weights: int
    dense: bool
    deployment: Deployment
    runtime: str
    context: int
    batch: int
    cache_types: tuple[str, str]
    on_gpu: bool


class _Parts(NamedTuple):
    """Bytes of weights, cache, computation and overhead, and for a GPU also of main memory."""

    weights: int
    cache: int
    compute: int
    overhead: int
    main_memory: int = 0


def memory(
    spec: ModelSpec,
    deployment: Deployment,
    *,
    context: int,
    batch: int,
    kv_type: str | None = None,
    weights: int | None = None,
    runtime: str | None = None,
    on_gpu: bool = False,
) -> MemoryEstimate:
    """Predict the memory that serving a model takes.

    Args:
        spec: The model's shape. If the format cannot hold layers of different widths, the padded shape counts.
        deployment: How the model is packed, and which runtime serves it.
        context, batch: Tokens of each sequence, and number of sequences at once.
        kv_type: Type of keys and values: "f16", or in llama.cpp "q8_0" or "q4_0"; by default the deployment's.
        weights: Bytes of the stored tensors if they are known, such as those of a GGUF file; otherwise they follow from
            `deployment`.
        runtime: Another engine than the deployment's: one of `BASIS`, or one that a plug-in's exporter describes.
        on_gpu: Whether a discrete GPU serves the model; the result is then the GPU's memory.

    Raises:
        InputError: A size is below 1, the runtime does not have the type of cache, the blocks of that type do not
            divide a head, or the format cannot hold a tensor.
    """
    runtime = runtime or deployment.runtime
    if context < 1 or batch < 1:
        raise InputError(f"context and batch must be at least 1, not {context} and {batch}")
    check_runtime(runtime)
    cache_types = deployment.cache_types if kv_type is None else (kv_type, kv_type)
    check_cache(spec, runtime, cache_types)
    spec = as_held(spec, deployment)
    if weights is None:
        weights = weights_bytes(spec.tensors, deployment)
    dense = runtime in get_format(deployment.format).dense_in
    serving = _Serving(
        spec=spec,
        weights=weights,
        dense=dense,
        deployment=deployment,
        runtime=runtime,
        context=context,
        batch=batch,
        cache_types=cache_types,
        on_gpu=on_gpu,
    )
    parts = {"llama.cpp": _llama_cpp, "transformers": _transformers, "vllm": _vllm, "onnxruntime": _onnxruntime}
    found = parts[runtime](serving) if runtime in parts else _further(serving)
    return MemoryEstimate(
        weights_bytes=found.weights,
        kv_cache_bytes=found.cache,
        compute_bytes=found.compute,
        overhead_bytes=found.overhead,
        runtime=runtime,
        context=context,
        batch=batch,
        on_gpu=on_gpu,
        main_memory_bytes=found.main_memory,
    )


def check_runtime(name: str) -> None:
    """Refuse a name that no runtime has.

    Raises:
        InputError: There is no such runtime; the message lists the names.
    """
    if name not in BASIS and name not in (brought := further_runtimes()):
        raise InputError(f"there is no runtime {name!r}; the runtimes are {', '.join([*BASIS, *brought])}")


def check_cache(spec: ModelSpec, runtime: str, cache_types: tuple[str, str]) -> None:
    """Refuse types of keys and values in which a runtime cannot hold a model's cache.

    Raises:
        InputError: The runtime does not have a type, or its blocks do not divide a head.
    """
    for kind in cache_types:
        if kind not in CACHE_BYTES or (kind != "f16" and runtime != "llama.cpp"):
            known = ", ".join(CACHE_BYTES) if runtime == "llama.cpp" else "f16"
            raise InputError(f"{runtime} holds no KV cache in {kind!r}; it can be {known}")
        block, row = CACHE_BYTES[kind][1], spec.latent or spec.head_dim
        if row % block:
            raise InputError(
                f"llama.cpp holds keys and values in {kind} by blocks of {block}, which do not divide the {row} of "
                "this model: leave --kv-type out, or give f16"
            )


def check_evaluated_cache(spec: ModelSpec, runtime: str, cache_types: tuple[str, str]) -> None:
    """Refuse a cache as `check_cache` does, and one in which a student cannot be evaluated here.

    Raises:
        InputError: As `check_cache`, or the layers differ in what they cache and the types have fewer than 16 bits.
    """
    check_cache(spec, runtime, cache_types)
    if spec.kv_widths and cache_types != ("f16", "f16"):
        raise InputError(
            f"layers of this {spec.architecture} differ in what they cache, and a cache of fewer than 16 bits is not "
            "simulated for that: leave --kv-type out, or give f16"
        )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _windowed_cache(serving: _Serving, full: int, windowed: int) -> int:
    """Return the bytes of the cache and of recurrent states.

    Layers without a window hold `full` tokens, and layers with a window hold `windowed` tokens. Recurrent layers hold
    one state for each sequence.
    """
    spec = serving.spec
    held = cached_bytes(spec, serving.runtime, full, min(full, windowed), serving.cache_types)
    return held + 4 * spec.recurrent * serving.batch


def _further(serving: _Serving) -> _Parts:
    """Estimate as the plug-in's exporter describes its runtime. For a GPU the same figures stand: no more is known."""
    asked = further_runtime(serving.runtime).memory
    return _Parts(*asked(serving.spec, serving.deployment, serving.weights, serving.context, serving.batch))


def _llama_cpp(serving: _Serving) -> _Parts:
    """Estimate weights, KV, compute and overhead as llama.cpp allocates them on a CPU with flash attention.

    The graph's peak was read off llama.cpp's own "compute buffer size" lines, with one size varied at a time. It is in
    float32, for n = min(n_ubatch, context) tokens. It is five rows of the width, plus the largest of three: (1) gate,
    up and product of the FFN, or one row for GPT-NeoX, which has no gate; (2) the queries twice, or once with copied
    keys and values, or GPT-NeoX's fused queries, keys and values; (3) the logits of one token a sequence. The attention
    mask, F16 [cells, n], is added. This is exact for three layers and more. It is an upper bound for models whose FFN
    is narrower than twice the width, or with shared experts. Rows that are looked up for all layers (Gemma 4) are added
    too, but their place differs, so the sum is an upper bound. The output buffer holds one token's logits for each
    sequence. A tied table is held a second time for the head if its type is in `REPACKED`, or if the model is Gemma 4.

    On a GPU the output buffer and the table in which tokens are looked up stay in main memory (its log's "CUDA_Host").
    A tied table is held once more, for the head. Products with 16-bit weights copy their inputs and outputs.
    """
    spec, batch = serving.spec, serving.batch
    cells = _round_up(serving.context, _CACHE_CELLS)
    tokens = min(_UBATCH, serving.context * batch)
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    logits = 4 * batch * spec.vocabulary
    ffn = active_ffn(spec) * (3 if gated(spec) else 1)
    attention = latent_attention(spec) if spec.latent else max(2 * queries, queries + 3 * keys)
    peak = max(4 * tokens * max(ffn, attention, *fused_rows(spec)), logits)
    if recurrent := recurrent_rows(spec):
        peak = max(peak, 4 * (tokens * recurrent + batch * spec.recurrent // max(1, spec.kv_widths.count(0))))
    if by_layer := rows_by_layer(spec):
        peak = max(peak + 4 * tokens * (2 * by_layer + spec.width), 4 * tokens * 3 * by_layer)
    compute = 4 * tokens * 5 * spec.width + peak + 2 * cells * tokens + _INPUT_BYTES * tokens
    overhead = spec.process_bytes or LLAMA_CPP_PROCESS_BYTES + LLAMA_CPP_VOCABULARY_BYTES * spec.vocabulary
    overhead += STEPS_BYTES.get(graph_named(spec.architecture), 0) * tokens
    windowed, window = cells, window_in(spec, serving.runtime)[0]
    if window:
        windowed = min(cells, _round_up(window + tokens, _CACHE_CELLS))
        compute += 2 * windowed * tokens
    cache = _windowed_cache(serving, cells * batch, windowed * batch)
    table, further = _table_bytes(serving)
    if not serving.on_gpu:
        return _Parts(serving.weights, cache, compute + logits, overhead + (table if _held_twice(serving) else 0))
    copies = 2 * tokens * 2 * max(spec.width, queries, active_ffn(spec))
    held = max(0, serving.weights - further - (0 if spec.tied else table))
    return _Parts(held, cache, compute, CUBLAS_WORKSPACE_BYTES + copies, overhead + table + further + logits)


def _held_twice(serving: _Serving) -> bool:
    """Return whether a tied table is held twice: as rows to look up, and for the head.

    For some types the head's copy has eight rows interleaved.
    """
    spec, kinds, file = serving.spec, [TYPES[kind] for kind in REPACKED], serving.deployment.file
    tables = [one for one in tensors_of(spec.tensors, Role.EMBEDDING) if not is_further_table(one, spec)]
    return spec.tied and any(
        graph_named(spec.architecture) in HEAD_APART
        or (
            tensor.shape[0] % _INTERLEAVED == 0
            and (file.table in REPACKED if file else serving.deployment.storage(tensor) in kinds)
        )
        for tensor in tables
    )


def _table_bytes(serving: _Serving) -> tuple[int, int]:
    """Return the bytes of the table in which tokens are looked up, and of further tables."""
    sizes, file = [0, 0], serving.deployment.file
    if file is not None:
        return file.table_bytes, 0
    for tensor in tensors_of(serving.spec.tensors, Role.EMBEDDING):
        sizes[is_further_table(tensor, serving.spec)] += tensor_bytes(tensor, serving.deployment.storage(tensor))
    return sizes[0], sizes[1]


def _transformers(serving: _Serving) -> _Parts:
    """Estimate transformers in bfloat16 on a CPU. The prompt is read in one pass, with logits of the last token only.

    The peak is in the last layer's FFN. In use are the cache, four tensors of the width (the embeddings, the residual
    stream, and its norm's input and value) and three of the FFN's width, or two if it has no gate. Attention leaves no
    further tensors in use. A layer with a window caches a slice of the prompt's keys and values, which keeps all of
    them alive. It has a mask of booleans, and a copy while the mask is made. `TRANSFORMERS_HOLES` is added. Weights are
    pages of a mapped file, all of which are resident once tokens from all over the table were read. On a GPU there is
    no heap with holes, and of torch's own allocator only one segment is predicted.
    """
    spec, batch = serving.spec, serving.batch
    weights = 2 * spec.parameters if serving.dense else serving.weights
    tokens = batch * serving.context
    activations = 2 * tokens * activation_rows(spec)
    masks = 2 * serving.context**2 if 0 < window_in(spec, serving.runtime)[0] < serving.context else 0
    logits = (2 + 4) * batch * spec.vocabulary
    cache = _windowed_cache(serving, tokens, tokens)
    if serving.on_gpu:
        overhead = CUBLAS_WORKSPACE_BYTES + TORCH_SEGMENT_BYTES
        return _Parts(weights, cache, activations + masks + logits, overhead, TRANSFORMERS_SERVING_BYTES)
    holes = int(TRANSFORMERS_HOLES * (cache + activations))
    return _Parts(weights, cache, activations + holes + masks + logits, TRANSFORMERS_SERVING_BYTES)


def _vllm(serving: _Serving) -> _Parts:
    """Estimate the minimum for vLLM: quantised weights, paged KV in bfloat16, and the activations of one step.

    By default vLLM takes the rest of the device for more KV cache; `gpu_memory_utilization` limits that. If no device
    is named, CUDA's context counts too.
    """
    spec, batch = serving.spec, serving.batch
    paged = _round_up(serving.context, _VLLM_BLOCK) * batch
    cache = _windowed_cache(serving, paged, (window_in(spec, serving.runtime)[0] + _VLLM_BATCHED_TOKENS) * batch)
    activations = 2 * _VLLM_BATCHED_TOKENS * (4 * spec.width + 3 * active_ffn(spec))
    logits = (2 + 4) * batch * spec.vocabulary
    if serving.on_gpu:
        overhead = VLLM_GRAPHS_BYTES + CUBLAS_WORKSPACE_BYTES
        return _Parts(serving.weights, cache, activations + logits, overhead, TRANSFORMERS_SERVING_BYTES)
    return _Parts(serving.weights, cache, activations + logits, VLLM_PROCESS_BYTES)


def _onnxruntime(serving: _Serving) -> _Parts:
    """Estimate ONNX Runtime on a CPU, where it computes in float32, for the graphs that our exporter writes.

    The peak is in the pass over a prompt, which computes logits of all its tokens. It holds them twice if the head's
    blocks have offsets, because these are multiplied separately. The scores between all tokens are held for every head
    of a layer, and the mask is added. A step holds the cache twice: as an input, and one token longer as an output.
    That takes less than a prompt's logits and scores, except for small vocabularies.
    """
    spec, batch = serving.spec, serving.batch
    tokens = batch * serving.context
    logits = 4 * tokens * spec.vocabulary * (2 if _offset_head(serving) else 1)
    scores = 4 * tokens * spec.heads * serving.context
    mask = 5 * serving.context**2
    queries = 4 * tokens * 2 * spec.heads * spec.head_dim
    worked = 4 * tokens * activation_rows(spec) + queries + scores
    cache = 2 * kv_bytes(spec, spec.layers, tokens, ("f16", "f16"))
    compute = max(logits + worked + mask, cache)
    process = ONNX_PROCESS_BYTES + spec.layers * ONNX_LAYER_BYTES
    overhead = CUBLAS_WORKSPACE_BYTES if serving.on_gpu else process
    return _Parts(_onnx_weights(serving), cache, compute, overhead, process if serving.on_gpu else 0)


def _onnx_weights(serving: _Serving) -> int:
    """Return the bytes of all weights in ONNX Runtime on a CPU."""
    spec, stored = serving.spec, serving.deployment
    kinds = [(tensor, 1) for tensor in spec.tensors] if stored.by_name else spec.kinds
    return sum(times * onnx_bytes(tensor, stored.storage(tensor), tied=spec.tied) for tensor, times in kinds)


def onnx_bytes(tensor: TensorSpec, storage: Storage, *, tied: bool) -> int:
    """Return the bytes of one tensor in ONNX Runtime on a CPU.

    Weights in 16 bits are widened when a session begins. The exception is the table, whose rows are looked up as they
    are stored; a tied table is held once more as the head's matrix. A code with up to 16 values takes 4 bits, every
    other code 8. The further bytes of a group were measured on random weights (onnxruntime 1.32). They are the scale
    and the offset in float32, and if these are stored in 16 bits, also as stored. For 8-bit codes they include a copy
    of the scale and the codes' sum, with which the kernel multiplies. For offsets that are moved to a code of 0, they
    include the values from which these are computed.
    """
    count, table = math.prod(tensor.shape), tensor.role is Role.EMBEDDING
    if isinstance(storage, Grid):
        wide = storage.qmax - storage.qmin >= 16
        codes = count if wide else count // 2
        groups = count // storage.group(tensor.shape[-1])
        numbers, narrow = 1 if storage.symmetric else 2, not storage.block_size
        beside = numbers * (6 if narrow else 4) + (8 if wide else 0 if storage.symmetric else 4)
        looked_up, product = codes + (2 if narrow else 4) * numbers * groups, codes + beside * groups
    else:
        looked_up, product = 2 * count, 4 * count
    return (looked_up if table else 0) + (product if not table or tied else 0)


def _offset_head(serving: _Serving) -> bool:
    """Return whether the blocks of the matrix that computes logits have offsets."""
    role = Role.EMBEDDING if serving.spec.tied else Role.HEAD
    heads = [serving.deployment.storage(tensor) for tensor, _ in serving.spec.kinds if tensor.role is role]
    return any(isinstance(one, Grid) and not one.symmetric for one in heads)
