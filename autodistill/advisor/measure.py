"""Measure a student where it will be served: here, on a board over ssh, or by a script for another machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.advisor.describe import Described, deployment_named, describe
from autodistill.advisor.measure_request import MeasureRequest
from autodistill.advisor.measurements import Measured, store_measured
from autodistill.errors import InputError
from autodistill.estimates.block_times import keep_times, liked_multiple
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import speed
from autodistill.hardware.background_load import current_load
from autodistill.hardware.budget import CONTEXT
from autodistill.hardware.catalog import devices
from autodistill.hardware.device import ONE_CHIP
from autodistill.hardware.local import local_device
from autodistill.hardware.lookup import device_of_system, find_device
from autodistill.hardware.machine import detect, memory_bytes
from autodistill.models.config import config_of
from autodistill.models.model_folder import read_config
from autodistill.options import cache_folder, parsed
from autodistill.runtimes.launch_files import Launch, read_launch
from autodistill.runtimes.llama_bench import Bench, BoardResult, parse_result
from autodistill.runtimes.ssh import parse_board, run_on
from autodistill.runtimes.timing import Load, Timed, time_serving
from autodistill.strategy.deployment import GRAPH, STORED_AS, Deployment
from autodistill.utils.input_files import check_file

_PROMPT, _DECODED = 512, 64  # tokens
_ROUNDS = 3
_BOARD_SECONDS = 1800.0


def measure(request: MeasureRequest, notify: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure a student, store the result, and return it with the predictions.

    Args:
        request: The request.
        notify: Called with lines about progress, if the work takes minutes.

    Returns:
        Plain data. "measured" is the measurement. "device" is the known device that was measured, or None if it is not
        known; the measurement then corrects nothing. "predicted" has the predictions, "kept_in" the file of the result.
        "left" says in words what may be left on a board, or is None. For a script: where it was written. For blocks:
        their times under "blocks", and where they were stored.

    Raises:
        InputError: The student is damaged or has an unknown architecture, the context exceeds its own, a result is of
            another student, the machine is busy, or there are more threads than cores.
        RemoteError: The board cannot be reached, or fails.
    """
    if request.blocks:
        return _blocks(request, notify)
    model, deployment = described_export(request.path, request.runtime)
    # Refuse here what would be refused after the measurement, before anything runs.
    if model.spec.experts:
        raise InputError(f"{request.path} is a mixture of experts, which can be estimated and not measured")
    if request.device is not None:
        find_device(request.device, devices(*request.own_devices))
    if request.path.is_dir():
        if request.on or request.script or request.result:
            raise InputError(f"a board runs a GGUF file, and {request.path} is a folder: export it with --to gguf")
        return _kept(request, _here(request, model, deployment), model)
    if not (request.on or request.script or request.result):
        return _kept(request, _here(request, model, deployment), model)
    board = parse_board(request.on, parsed(request.ssh_config)) if request.on else None
    bench = Bench(
        student=fingerprint(request.path),
        student_bytes=request.path.stat().st_size,
        prompt=parsed(request.prompt) or _PROMPT,
        decoded=parsed(request.decoded) or _DECODED,
        repetitions=request.rounds or _ROUNDS,
        threads=request.threads,
        **_of_llama_bench(read_launch(request.path)),
    )
    if request.script is not None:
        script = Path(request.script)
        check_file(script)
        try:
            script.write_text(bench.script(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {script}: {error.strerror}") from None
        return {"script": str(script), "student": bench.student}
    left = None
    if board is not None:
        timeout = parsed(request.timeout) or _BOARD_SECONDS
        said, left = run_on(board, bench.script(), request.path, request.bench, timeout)
        where = board.name
    else:
        assert request.result is not None
        printed, where = Path(request.result), str(request.result)
        check_file(printed)
        try:
            said = printed.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"cannot read {where}: {error.strerror}") from None
    found = parse_result(said, where)
    if found.student != bench.student:
        raise InputError(f"{where} is for another student than {request.path}: give the file that was measured")
    return _kept(request, _of_board(request, found, model, deployment), model) | {"left": left}


def _blocks(request: MeasureRequest, notify: Callable[[str], None]) -> dict[str, Any]:
    """Time blocks with a model's dimensions on this machine, store the times, and return them."""
    model = describe(str(request.student))
    context = _context(request, model, CONTEXT)
    _check_quiet(request, detect().cpus)
    # Import only now, since it imports torch to pack weights. Wrong input is reported before that.
    from autodistill.advisor.blocks.timing import time_blocks

    times = time_blocks(model.spec, model.name, context, request.rounds or _ROUNDS, notify)
    kept = keep_times(cache_folder(request.cache), times)
    return {"blocks": times.to_json(), "liked_multiple": liked_multiple(times.widths), "kept_in": str(kept)}


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's weight files in order."""
    digest = hashlib.sha256()
    for file in weights_of(path):
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def weights_of(path: Path) -> list[Path]:
    """Return the files that hold a student's weights: the file itself, or the weight files of a folder."""
    if not path.is_dir():
        return [path]
    return [*sorted(path.glob("*.safetensors")), *sorted(path.glob(f"{GRAPH}*"))]


def described_export(path: Path, runtime: str | None) -> tuple[Described, Deployment]:
    """Return the student's shape, and the deployment of most of its weights, with the cache types of its `serve.json`.

    Raises:
        InputError: There is no student, or the runtime does not serve it as it is.
    """
    if not path.exists():
        raise InputError(f"there is no student {path}: give a .gguf file, or an exported folder")
    if not path.is_dir():
        check_file(path)
    model = describe(str(path))
    if not weights_of(path):
        raise InputError(f"{path} has no safetensors and no {GRAPH}: give an exported student, or a .gguf file")
    if (path / GRAPH).is_file():
        stored = read_config(path).get(STORED_AS)
        if stored is None:
            raise InputError(f"the config.json of {path} has no {STORED_AS}: export it again with --to onnx")
        deployment = Deployment.from_json(stored, STORED_AS)
    elif path.is_dir():
        named = model.format_name or "huggingface"
        # transformers is the default, because vLLM needs a GPU.
        deployment = deployment_named(named, runtime if runtime == "vllm" else "transformers")
    else:
        keys, values = ("f16", "f16") if (launch := read_launch(path)) is None else launch.cache_types
        plain = deployment_named(model.format_name or "gguf-q8_0")
        deployment = replace(plain, cache_type_k=keys, cache_type_v=values)
    if runtime not in (None, deployment.runtime):
        raise InputError(
            f"{path} is served by {deployment.runtime}, not by {runtime}: leave --runtime out, or export it in a "
            f"format that {runtime} reads (docs/formats.md)"
        )
    return model, deployment


def _launch(request: MeasureRequest, model: Described) -> Launch:
    """Return how the student is started here: as requested, or else as its `serve.json` says, or else by default."""
    told = None if request.path.is_dir() else read_launch(request.path)
    usual = told or Launch(context=CONTEXT, slots=1, cache_types=("f16", "f16"), flash_attention="auto")
    return replace(usual, context=_context(request, model, usual.context), slots=max(request.counts or (usual.slots,)))


def _of_llama_bench(launch: Launch | None) -> dict[str, str]:
    """Return the settings of a launch that llama-bench takes. Without a launch, it uses its defaults."""
    if launch is None:
        return {}
    keys, values = launch.cache_types
    return {"cache_k": keys, "cache_v": values, "flash": {"on": "1", "off": "0"}.get(launch.flash_attention, "")}


def _context(request: MeasureRequest, model: Described, usual: int) -> int:
    """Return the context of each stream. The default is limited to the student's own context."""
    most, asked = model.spec.max_context, parsed(request.context)
    if asked is None:
        return min(usual, most)
    if asked > most:
        raise InputError(f"{request.path} has a context of {most} tokens: give --context {most} or less")
    return asked


def _here(request: MeasureRequest, model: Described, deployment: Deployment) -> Measured:
    launch = _launch(request, model)
    load = _load(request, launch)
    cores = detect().cpus
    if request.threads > cores:
        raise InputError(f"--threads {request.threads} is more than the cores here, {cores}: give {cores} or less")
    threads = request.threads or cores
    _check_quiet(request, threads)
    timed = time_serving(
        request.path,
        deployment.runtime,
        load,
        vocabulary=model.spec.vocabulary,
        context=launch.context,
        threads=threads,
        slots=launch.slots,
        cache_types=launch.cache_types,
        flash_attention=launch.flash_attention,
    )
    alone = timed.alone
    first = timed.first_token_ms(50)
    return Measured(
        **_common(request, model, deployment),
        machine=timed.machine,
        how="autodistill",
        threads=threads,
        prompt=alone.prompt,
        context=alone.behind,
        ttft_ms=first,
        tpot_ms=alone.tpot_ms(50),
        tpot_p95_ms=alone.tpot_ms(95),
        tokens_per_second=alone.tokens_per_second,
        prompt_tokens_per_second=1e3 * alone.prompt / first,
        peak_bytes=timed.peak_bytes,
        board=_own_facts(timed, cores) | _started(launch, deployment) | {"memory_bytes": memory_bytes()},
        loads=tuple(one.to_json() for one in timed.loads),
        doubts=timed.doubts,
    )


def _check_quiet(request: MeasureRequest, threads: int) -> None:
    """Refuse a busy machine, unless the request accepts it."""
    seen = current_load(threads)
    if seen.doubts and not request.busy:
        raise InputError(f"this machine is busy ({seen.doubts[0]}): stop other work, or accept it with --busy")


def _load(request: MeasureRequest, launch: Launch) -> Load:
    """Return the load to time. A requested prompt or answer is never shortened."""
    context = launch.context
    given = {"decoded": parsed(request.decoded), "prompt": parsed(request.prompt)}
    prompt, decoded = given["prompt"] or _PROMPT, given["decoded"] or _DECODED
    load = Load(
        prompts=tuple(sorted({min(one, prompt) for one in (16, 64, 256, prompt)})),
        prompt=prompt,
        decoded=decoded,
        streams=tuple(sorted({1, *(request.counts or (launch.slots,))})),
        rounds=request.rounds or _ROUNDS,
    ).within(context)
    for name, held in (("decoded", load.decoded), ("prompt", load.prompt)):
        asked = given[name]
        if asked is not None and held < asked:
            raise InputError(
                f"a context of {context} tokens is too short for --{name} {asked}, since a prompt and its answer share "
                f"it: give --{name} {held} or less, or more --context"
            )
    return load


def _started(launch: Launch, deployment: Deployment) -> dict[str, Any]:
    """Return the settings of llama.cpp's start for the record. The cache types are part of the deployment."""
    return (
        {"slots": launch.slots, "flash_attention": launch.flash_attention} if deployment.runtime == "llama.cpp" else {}
    )


def _own_facts(timed: Timed, cores: int) -> dict[str, Any]:
    first = {str(prompt): float(np.median(times)) for prompt, times in timed.first_ms.items()}
    return {"cores": cores, "ttft_ms_by_prompt": first, "context": timed.context, **asdict(timed.noise)}


def _of_board(request: MeasureRequest, found: BoardResult, model: Described, deployment: Deployment) -> Measured:
    steps = np.array(found.step_ms)
    doubts = []
    if found.throttled:
        doubts.append("the board slowed itself down meanwhile: cool it, or power it better")
    if found.threads > found.cores:
        doubts.append(f"{found.threads} threads shared the board's {found.cores} cores: give fewer --threads")
    elif found.load_average is not None and found.load_average + found.threads > found.cores + 0.5:
        doubts.append(f"the board was busy: a load of {found.load_average:.1f} on {found.cores} cores")
    facts = {
        name: getattr(found, name)
        for name in ("system", "cores", "temperature", "throttled", "power_mode", "watts", "joules_per_token")
    }
    keys, values = found.cache_types
    return Measured(
        **_common(request, model, replace(deployment, cache_type_k=keys, cache_type_v=values)),
        machine=_device_name(request, found),
        how=f"llama-bench {found.build}",
        threads=found.threads,
        prompt=found.prompt,
        # llama-bench starts to decode with an empty context, so the mean context is half of what it decodes.
        context=max(1, found.decoded // 2),
        ttft_ms=float(np.median(found.prompt_ms)),
        tpot_ms=float(np.median(steps)),
        tpot_p95_ms=float(np.percentile(steps, 95)),
        tokens_per_second=1e3 / float(np.mean(steps)),
        prompt_tokens_per_second=1e3 * found.prompt / float(np.mean(found.prompt_ms)),
        peak_bytes=found.peak_bytes,
        board=facts | {"machine": found.board, "memory_bytes": found.memory_bytes, "load_average": found.load_average},
        doubts=tuple(doubts),
    )


def _common(request: MeasureRequest, model: Described, deployment: Deployment) -> dict[str, Any]:
    return {
        "student": fingerprint(request.path),
        "name": str(request.path),
        "shape": config_of(model.spec),
        "deployment": deployment.to_json(),
        "size_bytes": sum(file.stat().st_size for file in weights_of(request.path)),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device_name(request: MeasureRequest, found: BoardResult) -> str:
    """Return the known device that a board is, from the user or the board's system, or else the board's own name."""
    known = devices(*request.own_devices)
    if request.device is not None:
        return find_device(request.device, known).name
    device = device_of_system(
        found.board, known, memory_bytes=found.memory_bytes, cores=found.cores, mode=found.power_mode
    )
    # A discrete GPU is the device, whatever machine it is in. The GPU of a one-chip board says less than the board.
    if found.machine != found.board and (device is None or device.kind.name not in ONE_CHIP):
        device = device_of_system(found.machine, known)
    return found.machine if device is None else device.name


def _kept(request: MeasureRequest, measured: Measured, model: Described) -> dict[str, Any]:
    deployment = Deployment.from_json(measured.deployment)
    path = store_measured(Path(request.runs), measured)
    device = next((one for one in devices(*request.own_devices) if measured.is_of(one)), None)
    if device is None and measured.how == "autodistill":
        here = local_device(cache_folder(request.cache))
        device = here if here.name == measured.machine else None
    predicted: dict[str, Any] = {}
    if measured.how == "autodistill":
        launch = _launch(request, model)
        context, batch = launch.context, launch.slots
        if deployment.runtime in ("transformers", "onnxruntime"):
            # These hold only the tokens that were read. llama.cpp allocates memory for the whole context.
            load = _load(request, launch)
            context = load.prompt + load.decoded - 1
        on_gpu = device is not None and device.discrete
        asked: dict[str, Any] = {"context": context, "batch": batch, "weights": model.weights_bytes, "on_gpu": on_gpu}
        # llama.cpp's measured peak is that of its process, which says nothing about a GPU's memory.
        if not on_gpu or deployment.runtime != "llama.cpp":
            predicted["memory_bytes"] = memory(model.spec, deployment, **asked).total_bytes
    if device is not None:
        step = speed(model.spec, deployment, device, context=measured.context, weights=model.weights_bytes)
        read = speed(
            model.spec,
            deployment,
            device,
            context=measured.prompt,
            prompt=measured.prompt,
            weights=model.weights_bytes,
        )
        predicted |= {"tpot_ms": step.decode_ms, "ttft_ms": read.time_to_first_token_ms}
    name = None if device is None else device.name
    document = {"measured": measured.to_json(), "device": name, "predicted": predicted}
    return document | {"kept_in": str(path), "left": None}
