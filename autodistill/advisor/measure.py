"""Measurement of a student where it will be served: here, on a board over ssh, or by a script for another machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.advisor.describe import Described, deployment_named, describe
from autodistill.advisor.measurements import Measured, store_measured
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import speed
from autodistill.hardware.background_load import current_load
from autodistill.hardware.budget import CONTEXT, check_streams
from autodistill.hardware.catalog import devices
from autodistill.hardware.device import ONE_CHIP
from autodistill.hardware.local import local_device
from autodistill.hardware.lookup import device_of_system, find_device
from autodistill.hardware.machine import detect, memory_bytes
from autodistill.models.config import config_of
from autodistill.serving.llama_bench import Bench, BoardResult, parse_result
from autodistill.serving.ssh import parse_board, run_on
from autodistill.serving.timing import Load, Timed, time_serving
from autodistill.strategy.deployment import Deployment
from autodistill.utils.input_files import check_file
from autodistill.utils.plain_dataclass import check_no_blank

_PROMPT, _DECODED = 512, 64  # tokens
_ROUNDS = 3
_BOARD_SECONDS = 1800.0
# Where an option means something, of those that do not everywhere.
_PLACES = {
    "bench": ("--on",),
    "ssh_config": ("--on",),
    "device": ("--on", "--result"),
    "context": ("here",),
    "streams": ("here",),
    "busy": ("here",),
    "prompt": ("here", "--on", "--script"),
    "decoded": ("here", "--on", "--script"),
    "rounds": ("here", "--on", "--script"),
    "threads": ("here", "--on", "--script"),
    "timeout": ("--on",),
}


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """What is measured, where and how.

    Attributes:
        student: A GGUF file, or a folder of transformers, which is measured here alone.
        out: Folder of the runs, beside which the measurement is kept.
        on: A board like "ssh://pi@raspberrypi.local"; None is this machine.
        script: Where a script for a board without ssh is written; nothing is measured then.
        result: What that script printed.
        bench: Path of llama-bench on the board.
        device: What the board is among the known devices; None where its system's name says so.
        own: Files of devices of a person's own.
        ssh_config: As `remote.Board` takes it.
        context: Of a measurement here: tokens of each stream; 2048 by default, or what the student reads.
        streams: Of a measurement here: numbers of streams.
        prompt, decoded: Tokens; by default 512 and 64, or what the context holds of them.
        rounds: How many times; 3 by default.
        threads: CPU threads; 0 is as many as there are cores.
        cache: Folder where this machine's own bandwidth is kept.
        timeout: Seconds that a board may take; half an hour by default.
        busy: Whether a busy machine is measured all the same, and the figures marked.
    """

    student: Path
    out: Path
    on: str | None = None
    script: Path | None = None
    result: Path | None = None
    bench: str | None = None
    device: str | None = None
    own: Sequence[Path] = ()
    ssh_config: Path | None = None
    context: int | None = None
    streams: tuple[int, ...] = (1,)
    prompt: int | None = None
    decoded: int | None = None
    rounds: int | None = None
    threads: int = 0
    cache: Path | None = None
    timeout: float | None = None
    busy: bool = False

    def __post_init__(self) -> None:
        check_no_blank(self)
        places = {"--on": self.on, "--script": self.script, "--result": self.result}
        given = [name for name, place in places.items() if place is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} each say where it is measured: give one of them")
        place = given[0] if given else "here"
        for name, allowed in _PLACES.items():
            if getattr(self, name) not in (None, False, (1,)) and place not in allowed:
                where = place if place == "here" else f"by {place}"
                raise InputError(f"--{name.replace('_', '-')} changes nothing of a measurement {where}: leave it out")
        for count in self.streams or (0,):
            check_streams(count, "--streams")
        # An answer is a first token and one that follows it.
        for name, least in (("context", 2), ("prompt", 1), ("decoded", 2), ("rounds", 1)):
            asked = getattr(self, name)
            if asked is not None and asked < least:
                raise InputError(f"--{name} must be at least {least}, not {asked}")


def measure(request: MeasureRequest) -> dict[str, Any]:
    """Measure a student, store the result, and return it with the predictions.

    Returns:
        Plain data: the measurement under "measured", the known device that it is of under "device" (None where it is of
        none, so that nothing is corrected by it), the predictions for that under "predicted", where it was kept, and
        what may be left on a board, in words, under "left" (None otherwise); or, for a script, where that was written.

    Raises:
        InputError: A student that is damaged or of no known architecture, a context beyond its own, a result of
            another student, a machine that is busy, or more threads than it has cores.
        RemoteError: A board that is not reached, or fails.
    """
    model, deployment = _described(request.student)
    # What would be refused of the result is so before anything runs.
    if model.spec.experts:
        raise InputError(f"{request.student} is a mixture of experts, which can be estimated and not measured")
    if request.device is not None:
        find_device(request.device, devices(*request.own))
    if request.student.is_dir():
        if request.on or request.script or request.result:
            raise InputError(f"a board runs a GGUF file, and {request.student} is a folder: export it with --to gguf")
        return _kept(request, _here(request, model, deployment), model, deployment)
    if not (request.on or request.script or request.result):
        return _kept(request, _here(request, model, deployment), model, deployment)
    board = parse_board(request.on, request.ssh_config) if request.on else None
    bench = Bench(
        student=fingerprint(request.student),
        student_bytes=request.student.stat().st_size,
        prompt=request.prompt or _PROMPT,
        decoded=request.decoded or _DECODED,
        repetitions=request.rounds or _ROUNDS,
        threads=request.threads,
    )
    if request.script is not None:
        check_file(request.script)
        try:
            request.script.write_text(bench.script(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {request.script}: {error.strerror}") from None
        return {"script": str(request.script), "student": bench.student}
    left = None
    if board is not None:
        timeout = request.timeout or _BOARD_SECONDS
        said, left = run_on(board, bench.script(), request.student, request.bench, timeout)
        where = board.name
    else:
        assert request.result is not None
        where = str(request.result)
        check_file(request.result)
        try:
            said = request.result.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"cannot read {where}: {error.strerror}") from None
    found = parse_result(said, where)
    if found.student != bench.student:
        raise InputError(f"{where} is of another student than {request.student}: give the file that was measured")
    return _kept(request, _of_board(request, found, model, deployment), model, deployment) | {"left": left}


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's safetensors files in order."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _described(path: Path) -> tuple[Described, Deployment]:
    """Return the student's shape, and the deployment of most of its weights."""
    if not path.exists():
        raise InputError(f"there is no student {path}: give a .gguf file, or a folder of transformers")
    if not path.is_dir():
        check_file(path)
    model = describe(str(path))
    if path.is_dir():
        if not list(path.glob("*.safetensors")):
            raise InputError(f"{path} has no safetensors: give an exported student, or a .gguf file")
        return model, deployment_named(model.format_name or "huggingface", "transformers")
    return model, deployment_named(model.format_name or "gguf-q8_0")


def _context(request: MeasureRequest, model: Described) -> int:
    """Return the tokens of each stream; the default is limited to what the student reads."""
    most = model.spec.max_context
    if request.context is None:
        return min(CONTEXT, most)
    if request.context > most:
        raise InputError(f"{request.student} has a context of {most} tokens: give --context {most} or less")
    return request.context


def _here(request: MeasureRequest, model: Described, deployment: Deployment) -> Measured:
    context = _context(request, model)
    load = _load(request, context)
    cores = detect().cpus
    if request.threads > cores:
        raise InputError(f"--threads {request.threads} is more than the cores here, {cores}: give {cores} or less")
    threads = request.threads or cores
    seen = current_load(threads)
    if seen.doubts and not request.busy:
        raise InputError(f"this machine is busy ({seen.doubts[0]}): stop other work, or accept it with --busy")
    timed = time_serving(
        request.student,
        deployment.runtime,
        load,
        vocabulary=model.spec.vocabulary,
        context=context,
        threads=threads,
    )
    alone = timed.alone
    first = alone.ttft_ms(50)
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
        board=_own_facts(timed, cores) | {"memory_bytes": memory_bytes()},
        loads=tuple(one.to_json() for one in timed.loads),
        doubts=timed.doubts,
    )


def _load(request: MeasureRequest, context: int) -> Load:
    """Return the load to time; a requested prompt or answer is never shortened."""
    prompt, decoded = request.prompt or _PROMPT, request.decoded or _DECODED
    load = Load(
        prompts=tuple(sorted({min(one, prompt) for one in (16, 64, 256, prompt)})),
        prompt=prompt,
        decoded=decoded,
        streams=tuple(sorted({1, *request.streams})),
        rounds=request.rounds or _ROUNDS,
    ).within(context)
    for name, asked, held in (("decoded", request.decoded, load.decoded), ("prompt", request.prompt, load.prompt)):
        if asked is not None and held < asked:
            raise InputError(
                f"a context of {context} tokens does not hold --{name} {asked}, as a prompt and its answer share it: "
                f"give --{name} {held} or less, or more --context"
            )
    return load


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
    return Measured(
        **_common(request, model, deployment),
        machine=_device_name(request, found),
        how=f"llama-bench {found.build}",
        threads=found.threads,
        prompt=found.prompt,
        # llama-bench decodes into an empty context.
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
    files = request.student.glob("*.safetensors") if request.student.is_dir() else [request.student]
    return {
        "student": fingerprint(request.student),
        "name": str(request.student),
        "shape": config_of(model.spec),
        "deployment": deployment.to_json(),
        "size_bytes": sum(file.stat().st_size for file in files),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device_name(request: MeasureRequest, found: BoardResult) -> str:
    """Return the known device that a board is, from the user or its system; else the board's own name."""
    known = devices(*request.own)
    if request.device is not None:
        return find_device(request.device, known).name
    device = device_of_system(
        found.board, known, memory_bytes=found.memory_bytes, cores=found.cores, mode=found.power_mode
    )
    # A GPU of its own is the device, whatever machine it sits in; that of a board says less than the board.
    if found.machine != found.board and (device is None or device.kind.name not in ONE_CHIP):
        device = device_of_system(found.machine, known)
    return found.machine if device is None else device.name


def _kept(request: MeasureRequest, measured: Measured, model: Described, deployment: Deployment) -> dict[str, Any]:
    path = store_measured(request.out, measured)
    device = next((one for one in devices(*request.own) if measured.is_of(one)), None)
    if device is None and measured.how == "autodistill" and request.cache is not None:
        here = local_device(request.cache)
        device = here if here.name == measured.machine else None
    predicted: dict[str, Any] = {}
    if measured.how == "autodistill":
        context, batch = _context(request, model), max(1, *request.streams)
        if deployment.runtime == "transformers":
            # It holds what was read, where llama.cpp makes room for all of the context.
            load = _load(request, context)
            context = load.prompt + load.decoded - 1
        on_gpu = device is not None and device.discrete
        asked: dict[str, Any] = {"context": context, "batch": batch, "weights": model.weights_bytes, "on_gpu": on_gpu}
        # llama.cpp's peak is that of its process, which says nothing of a GPU's memory.
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
