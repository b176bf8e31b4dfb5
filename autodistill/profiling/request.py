"""The request of `profile`, and the choice between its tasks: tracing a strategy's training or a model's serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from autodistill.distillation.teacher.resolve import locate
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import check_runtime
from autodistill.hardware.device import Device
from autodistill.hardware.local import local_device
from autodistill.hardware.machine import detect_for_training
from autodistill.models.model_folder import gguf_within
from autodistill.options import DEFAULT_TEACHER, Cache, Option, cache_folder, counts_tokens, parsed, read_texts
from autodistill.strategy.named import load_strategy

# Options that apply to only one of the tasks, with their defaults.
_TRAINING = {"teacher": DEFAULT_TEACHER, "step_tokens": 1024, "sequence_length": 256, "steps": 3}
_SERVING = {"prompt": 256, "decoded": 32, "runtime": None}


def _number(help: str) -> Option:
    return Option(help=help, metavar="N", minimum=1)


def _tokens(help: str) -> Option:
    return counts_tokens(help, minimum=1)


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """What is profiled, and how much of it."""

    target: Annotated[
        str | Path,
        Option(
            help=(
                "A strategy, by name or .yaml file, to trace its training; or an exported folder or .gguf file, to "
                "trace its serving."
            ),
            metavar="STRATEGY|EXPORT",
            argument=True,
            complete="strategies",
        ),
    ] = field(kw_only=False)
    out: Annotated[
        str | Path,
        Option(help="Folder for the trace and the figures (default: profile).", metavar="DIR", typed=Path, parse=Path),
    ] = Path("profile")
    teacher: Annotated[
        str | Path | None,
        Option(help="Training: the teacher, a folder, a .gguf file, a hub id, or smollm2 (default).", metavar="REF"),
    ] = None
    step_tokens: Annotated[str | int | None, _tokens("Training: tokens of an optimiser step (default: 1024).")] = None
    sequence_length: Annotated[str | int | None, _tokens("Training: length of a sequence (default: 256).")] = None
    steps: Annotated[int | None, _number("Training: steps that are traced (default: 3).")] = None
    prompt: Annotated[str | int | None, _tokens("Serving: length of the prompt (default: 256).")] = None
    decoded: Annotated[str | int | None, _tokens("Serving: tokens that are written (default: 32).")] = None
    runtime: Annotated[
        str | None,
        Option(
            help="Serving: llama.cpp, transformers, vllm or onnxruntime (default: as the export is).", metavar="NAME"
        ),
    ] = None
    threads: Annotated[int, Option(help="CPU threads; 0 uses every core.", metavar="N", minimum=0)] = 0
    cache: Cache = None

    def __post_init__(self) -> None:
        read_texts(self)
        others, this = (_TRAINING, "a served model") if self.is_served else (_SERVING, "a strategy's training")
        given = [name for name in others if getattr(self, name) is not None]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} does not apply to {this}: leave it out")

    @property
    def is_served(self) -> bool:
        """Whether the target is a model on disk, not a strategy."""
        path = Path(self.target)
        return path.suffix == ".gguf" or path.is_dir()

    def value(self, name: str) -> Any:
        """Return the value of an option, or its default if it was not given."""
        given = getattr(self, name)
        return (_TRAINING | _SERVING)[name] if given is None else given


def profile(request: ProfileRequest, notify: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Trace a training step, or serving, and report where the time goes. The figures are written next to the trace.

    Raises:
        InputError: The target is neither a strategy nor a model, a folder cannot be written, or the sizes do not fit.
    """
    if not request.is_served:
        strategy = load_strategy(request.target)
        locate(str(request.value("teacher")))
    elif request.runtime is not None:
        check_runtime(request.runtime)
    # The inputs exist. The engines are imported only now, since that takes seconds.
    import torch

    from autodistill.utils.json_files import write_json

    out = parsed(request.out)
    assert out is not None
    machine = detect_for_training()
    if request.threads > machine.cpus:
        raise InputError(f"--threads {request.threads} is more than the cores here, {machine.cpus}: give fewer")
    threads = request.threads or machine.cpus

    @cache
    def here() -> Device:
        return local_device(cache_folder(request.cache))

    if request.is_served:
        from autodistill.advisor.measure import described_export
        from autodistill.profiling.serving import profile_serving

        path = gguf_within(Path(request.target))
        model, deployment = described_export(path, request.value("runtime"))
        sizes = {name: request.value(name) for name in ("prompt", "decoded")}
        found = profile_serving(path, model, deployment, out=out, threads=threads, here=here, notify=notify, **sizes)
    else:
        from autodistill.profiling.training import profile_training

        torch.set_num_threads(threads)
        found = profile_training(
            strategy,
            str(request.value("teacher")),
            cache=cache_folder(request.cache),
            out=out,
            step_tokens=request.value("step_tokens"),
            sequence_length=request.value("sequence_length"),
            steps=request.value("steps"),
            device="cuda" if machine.gpus else "cpu",
            bf16=machine.bf16,
            here=here,
            notify=notify,
        )
    write_json(out / "profile.json", found)
    return found


def described(document: dict[str, Any]) -> str:
    """Return a profile as a table for the user, with advice."""
    if document["what"] == "training":
        lines = [
            f"A step of {document['step_tokens']:,} tokens takes {document['step_ms']:.1f} ms on "
            f"{document['machine']}: {document['tokens_per_second']:,.0f} tokens/s. Its floor is "
            f"{document['floor_ms']:.1f} ms, {document['floor_tokens_per_second']:,.0f} tokens/s.",
            "",
            *_table(document["parts"], document["traced_step_ms"]),
        ]
        each = document["each_step"]
        counts = f"{each['operations']:,.0f} operations a step, {each['read_back']:.0f} of which read a value back"
        if each["launches"]:
            counts += f"; {each['launches']:,.0f} kernels, {each['transfers']:.0f} transfers of "
            counts += f"{each['transferred_bytes']:,.0f} bytes, {each['synchronizations']:.0f} waits"
        lines += ["", f"{counts}."]
        traces = [document["trace"]]
    else:
        lines = [
            f"{document['model']} as {document['deployment']} in {document['runtime']} on {document['machine']}, "
            f"{document['threads']} threads, a prompt of {document['prompt']} tokens:",
            "",
            *_table(document["parts"], None),
        ]
        for name, found in document["operations"].items():
            whole = sum(found["ms"].values())
            parts = [{"part": one, "ms": ms, "share": ms / whole, "floor_ms": None} for one, ms in found["ms"].items()]
            lines += ["", f"{name}, traced:", *_table(parts, whole)]
        traces = list(document["traces"].values())
    return "\n".join([*lines, "", *document["advice"], *(f"trace: {path}" for path in dict.fromkeys(traces))])


def _table(parts: list[dict[str, Any]], whole: float | None) -> list[str]:
    cells = [("", "ms", "share", "floor ms")]
    for one in parts:
        floor = "-" if one["floor_ms"] is None else f"{one['floor_ms']:.2f}"
        cells.append((one["part"], f"{one['ms']:.2f}", f"{one['share']:.0%}" if "share" in one else "", floor))
    if whole is not None:
        cells.append(("all, traced", f"{whole:.2f}", "", ""))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(["", first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))])
        for first, *rest in cells
    ]
