"""Trace an exported model while it is served: the time of reading a prompt and of writing tokens, with their floors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autodistill.advisor.describe import Described
from autodistill.errors import InputError
from autodistill.export.huggingface import load_in_transformers
from autodistill.hardware.device import Device
from autodistill.profiling.advice import serving_advice
from autodistill.profiling.floor import pass_floor
from autodistill.profiling.trace import Trace, check_folder, record, write_spans
from autodistill.runtimes.timing import serve
from autodistill.strategy.deployment import Deployment

READ, WRITE = "reading the prompt", "writing a token"
_WARM = 4  # tokens


def profile_serving(
    path: Path,
    model: Described,
    deployment: Deployment,
    *,
    out: Path,
    prompt: int,
    decoded: int,
    threads: int,
    here: Callable[[], Device],
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trace an exported model in its runtime with one stream.

    transformers runs in this process, where torch's profiler sees each operation. Other runtimes run in their own
    process. Their trace shows only when each prompt and token began and ended.

    Args:
        path: A GGUF file, or an exported folder.
        model, deployment: The model's description and its deployment.
        out: Folder for the traces.
        prompt, decoded: Tokens of a prompt, and tokens that are written after it.
        threads: CPU threads.
        here: Returns the device with its bandwidth and rates.
        notify: Called with a line about what happens.

    Returns:
        Plain data: time of a prompt and of a token with their floors, and advice about them.

    Raises:
        InputError: A folder cannot be written, or the tokens do not fit into the model's context.
        VerificationError: The runtime cannot load the model.
    """
    check_folder(out)
    if prompt + decoded + _WARM > model.spec.max_context:
        raise InputError(
            f"--prompt {prompt} and --decoded {decoded} do not fit the model's context of {model.spec.max_context}: "
            "give less of one"
        )
    device = here()
    floors = {
        READ: pass_floor(model.spec, deployment, device, tokens=prompt, behind=prompt / 2),
        WRITE: pass_floor(model.spec, deployment, device, tokens=1, behind=prompt + decoded / 2),
    }
    notify(f"tracing {path.name} in {deployment.runtime}")
    if deployment.runtime == "transformers":
        found = _in_transformers(path, model, out, prompt, decoded, threads)
    else:
        found = _in_its_process(path, model, deployment, out, prompt, decoded, threads)
    parts = [
        {"part": name, "ms": 1e3 * found["seconds"][name], "floor_ms": 1e3 * floors[name]} for name in (READ, WRITE)
    ]
    return {
        "what": "serving",
        "model": str(path),
        "deployment": deployment.name,
        "runtime": deployment.runtime,
        "machine": device.name,
        "threads": threads,
        "prompt": prompt,
        "decoded": decoded,
        "parts": parts,
        "operations": found["operations"],
        "traces": found["traces"],
        "advice": serving_advice(parts, on_cpu=not device.discrete),
    }


def _in_its_process(
    path: Path, model: Described, deployment: Deployment, out: Path, prompt: int, decoded: int, threads: int
) -> dict[str, Any]:
    """Return the times of each prompt and token, for a runtime in its own process."""
    ids = [index % model.spec.vocabulary for index in range(prompt)]
    spans: list[tuple[str, float, float]] = []

    def timed(name: str, work: Callable[[], float]) -> None:
        began = time.perf_counter()
        # The runtime's own clock, so that the pipe to it is not counted.
        spans.append((name, began, began + work()))

    context = min(model.spec.max_context, prompt + decoded + _WARM)
    cache = deployment.cache_types
    with serve(path, deployment.runtime, context=context, threads=threads, parallel=1, cache_types=cache) as server:
        server.begin([ids])
        for _ in range(_WARM):
            server.step()
        timed(READ, lambda: server.begin([ids[::-1]]))
        for _ in range(decoded):
            timed(WRITE, server.step)
    trace = out / "trace.json"
    write_spans(spans, trace)
    seconds = {name: _median([end - began for one, began, end in spans if one == name]) for name in (READ, WRITE)}
    return {"seconds": seconds, "operations": {}, "traces": {"all": str(trace)}}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _in_transformers(
    path: Path, model: Described, out: Path, prompt: int, decoded: int, threads: int
) -> dict[str, Any]:
    """Return the times and operations of a prompt and of the tokens after it, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_in_transformers(path).to(torch.bfloat16).to(device)
    ids = torch.arange(prompt, device=device)[None] % model.spec.vocabulary
    state: dict[str, Any] = {}

    def read() -> None:
        found = network(ids, use_cache=True, logits_to_keep=1)
        state.update(cache=found.past_key_values, token=found.logits[:, -1:].argmax(-1))

    def write() -> None:
        found = network(state["token"], cache=state["cache"], use_cache=True, logits_to_keep=1)
        state.update(cache=found.past_key_values, token=found.logits[:, -1:].argmax(-1))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            first = record(read, out / "trace-prompt.json", steps=1, device=device, name=READ)
            rest = record(write, out / "trace-tokens.json", steps=max(1, decoded // 2), device=device, name=WRITE)
    finally:
        torch.set_num_threads(before)
    traced = {READ: first, WRITE: rest}
    return {
        "seconds": {name: trace.seconds for name, trace in traced.items()},
        "operations": {name: _operations(trace) for name, trace in traced.items()},
        "traces": {name: str(trace.path) for name, trace in traced.items()},
    }


def _operations(trace: Trace) -> dict[str, Any]:
    """Return the milliseconds by kind of operation, and the counts, for one prompt or token."""
    counts = {name: value / trace.steps for name, value in asdict(trace.counts).items()}
    return {"ms": {name: 1e3 * seconds for name, seconds in trace.kinds.items()}, "each": counts}
