"""`solve`: choose how a teacher is stored within a budget at the least loss, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from autodistill.api.parameters import takes
from autodistill.api.paths import device_files
from autodistill.data.documents import check_data_reference
from autodistill.distillation.teacher.resolve import locate
from autodistill.errors import InputError
from autodistill.evaluation.base import Scoring
from autodistill.hardware.budget import CONTEXT, Budget, DeviceBudget, TierBudget, memory_on, parse_latency
from autodistill.hardware.device import LOCAL, Device
from autodistill.objects.solutions import Solutions
from autodistill.options import (
    DEFAULT_DATA,
    DEFAULT_TEACHER,
    Batch,
    Cache,
    Context,
    Devices,
    Latency,
    Option,
    cache_folder,
    counts_tokens,
    parsed,
    read_texts,
)
from autodistill.search.solve_request import SolveRequest, check_solved_for
from autodistill.units import parse_bytes

_STEPS = 7  # number of budgets in a sweep


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """The arguments of `solve`, as the user typed them."""

    teacher: Annotated[
        str | Path | None,
        Option(
            help="Teacher model: a transformers folder, a .gguf file, a hub id, or smollm2 (default).",
            metavar="TEACHER",
            argument=True,
        ),
    ] = field(default=None, kw_only=False)
    budget: Annotated[
        str | int | None,
        Option(help="Memory limit for the deployed model, like 16GB or 900MiB.", metavar="SIZE", parse=parse_bytes),
    ] = None
    sweep: Annotated[
        str | None, Option(help=f"Solve for {_STEPS} budgets instead, like 100MB..400MB.", metavar="SIZE..SIZE")
    ] = None
    device: Annotated[
        str | None,
        Option(
            help='Device the model will run on, like 4090, "pi 5" or local; sets the budget.',
            metavar="NAME",
            complete="devices",
        ),
    ] = None
    latency: Latency = None
    file_size: Annotated[
        str | int | None,
        Option(help="Limit of all weights in the file, like 120MB.", metavar="SIZE", parse=parse_bytes),
    ] = None
    tiers: Annotated[bool, Option(help="Solve for GPUs of 4 to 80 GB instead, as pick has them.")] = False
    runtime: Annotated[
        str,
        Option(
            help="What will serve it: llama.cpp, onnxruntime (onnx), or vllm (folders of compressed-tensors).",
            metavar="NAME",
        ),
    ] = "llama.cpp"
    data: Annotated[
        str | Path | None,
        Option(help="Text to score on: a folder, a .txt, .jsonl or .parquet file, or pydoc (default).", metavar="REF"),
    ] = None
    context: Context = None
    batch: Batch = None
    tokens: Annotated[
        str | int, counts_tokens("Tokens of text to score on, like 2048 or 16k; twice as many are held out.")
    ] = 2048
    coarse: Annotated[
        bool,
        Option(help="Give a first answer sooner: from a quarter of --tokens, with fewer tries."),
    ] = False
    sequence_length: Annotated[str | int, counts_tokens("Length of the sequences that are read.")] = 256
    memory: Annotated[
        str | int | None,
        Option(
            help="Memory that solving itself may take, like 16GB; a larger teacher is read layer by layer.",
            metavar="SIZE",
            parse=parse_bytes,
        ),
    ] = None
    scoring: Annotated[
        Scoring,
        Option(
            help="What the teacher is scored in: float32, tf32 on NVIDIA's GPUs, or bf16.",
            metavar="float32|tf32|bf16",
            typed=Scoring,
        ),
    ] = "float32"
    out: Annotated[
        str | Path | None,
        Option(
            help="Folder for the result, and for the solution with --export.", metavar="DIR", typed=Path, parse=Path
        ),
    ] = None
    export: Annotated[
        bool, Option(help="Write the solution, and verify it in its runtime, or for vllm in transformers.")
    ] = False
    plot: Annotated[
        str | Path | None,
        Option(
            help="Draw KL against memory into this file, like curve.svg or curve.png.",
            metavar="FILE",
            typed=Path,
            parse=Path,
        ),
    ] = None
    plan: Annotated[bool, Option(help="Say what solving would take on this machine, and solve nothing.")] = False
    solve_on: Annotated[
        str | None,
        Option(
            help="With --plan: say what it would take on this GPU instead, like 4090, by its data sheet.",
            metavar="NAME",
            complete="devices",
        ),
    ] = None
    candidate: Annotated[
        Sequence[str | Path] | None,
        Option(
            help="Measure this GGUF file of the same model too, and take it if it is better. Repeatable.",
            metavar="FILE",
            typed=list[str],
        ),
    ] = None
    devices: Devices = None
    cache: Cache = None

    def __post_init__(self) -> None:
        if isinstance(self.latency, str):
            # If the latency names no streams, it uses those of --batch.
            object.__setattr__(self, "latency", parse_latency(self.latency, self._batch))
        read_texts(self)
        named = (self.budget, self.sweep, self.device) != (None, None, None)
        if self.budget is not None and self.sweep is not None:
            raise InputError("--budget is one limit and --sweep several: give one of the two")
        if self.tiers and named:
            raise InputError("--tiers has the memory of GPUs for its budgets: leave --budget, --sweep and --device out")
        if self.tiers and self.latency:
            raise InputError("--tiers compares memory alone, and latency depends on the device: leave --latency out")
        if self.plan and self.plot is not None:
            raise InputError("--plan solves nothing that --plot could draw: leave one of the two out")
        if self.solve_on is not None and not self.plan:
            raise InputError("--solve-on names a GPU that is not here, where nothing can be solved: add --plan")
        if not self.tiers and not named and not self.latency:
            raise InputError(
                "solve takes --budget like 200MB, --sweep like 100MB..400MB, --device like local, or --tiers"
            )

    @property
    def _batch(self) -> int:
        return 1 if self.batch is None else self.batch

    def budgets(self) -> tuple[Budget, ...]:
        """Return the requested budgets. This may look up a device, and measure this machine."""
        load: dict[str, Any] = {
            "context": CONTEXT if self.context is None else parsed(self.context),
            "batch": self._batch,
        }
        load |= {"latency": self.latency} if self.latency else {}
        device = LOCAL if self.device is None and self.latency else self.device
        files = device_files(self.devices, device is not None or self.solve_on is not None)
        if self.tiers:
            from autodistill.advisor.pick import TIERS, tier_of
            from autodistill.hardware.catalog import listed

            known = [tier_of(size, listed()) for size in TIERS]
            return tuple(
                TierBudget(
                    memory_bytes=tier.usable_bytes, tier_bytes=tier.nominal_bytes, least_device=tier.device, **load
                )
                for tier in known
            )
        limits: Sequence[int | None] = [parsed(self.budget)] if self.sweep is None else _sweep(self.sweep)
        if device is None:
            return tuple(Budget(memory_bytes=limit or 0, **load) for limit in limits)
        from autodistill.hardware.local import choose_device

        found = choose_device(device, cache_folder(self.cache), files)
        return tuple(DeviceBudget(memory_bytes=memory_on(found, limit), device=found, **load) for limit in limits)

    def elsewhere(self) -> Device | None:
        """Return the GPU for which solving is planned, or None for this machine."""
        if self.solve_on is None:
            return None
        if self.solve_on.strip().lower() == LOCAL:
            raise InputError("--solve-on names a GPU that is not here; without it, --plan is of this machine")
        from autodistill.hardware.catalog import devices
        from autodistill.hardware.lookup import find_device

        return find_device(self.solve_on, devices(*device_files(self.devices, True)))


@takes(SolveOptions, "solve")
def solve(*, notify: Callable[[str], None] = lambda line: None, **options: Any) -> Solutions:
    """Choose how each matrix, table and cache is stored, so that least is lost within a budget. Nothing is trained.

    Raises:
        InputError: There is no such teacher, data or device; the runtime cannot hold the model; a candidate belongs to
            another model; or arguments contradict each other.
        NothingFitsError: The smallest storage exceeds every budget, or the written file exceeds its budget.
        VerificationError: The written file differs from what was measured.
    """
    asked = SolveOptions(**options)
    teacher, data = str(asked.teacher or DEFAULT_TEACHER), str(asked.data or DEFAULT_DATA)
    # Check names first: later steps may measure this machine for its budget, and import engines, which takes seconds.
    check_solved_for(asked.runtime)
    locate(teacher)
    check_data_reference(data)
    elsewhere = asked.elsewhere()
    budgets = asked.budgets()
    if (drawn := parsed(asked.plot)) is not None:
        from autodistill.report.solved import check_chart

        check_chart(drawn)
    request = SolveRequest(
        budgets=budgets,
        cache=cache_folder(asked.cache),
        teacher=teacher,
        data=data,
        tokens=parsed(asked.tokens),
        sequence_length=parsed(asked.sequence_length),
        out=parsed(asked.out),
        export=asked.export,
        candidates=tuple(map(Path, asked.candidate or ())),
        memory_bytes=parsed(asked.memory),
        file_bytes=parsed(asked.file_size),
        runtime=asked.runtime,
        scoring=asked.scoring,
        coarse=asked.coarse,
        context_by_default=asked.context is None,
    )
    from autodistill.search.solve import plan_solve
    from autodistill.search.solve import solve as solved

    found = Solutions(plan_solve(request, elsewhere) if asked.plan else solved(request, notify))
    if drawn is not None:
        from autodistill.report.solved import write_chart

        write_chart(found.plot(), drawn)
    return found


def _sweep(text: str) -> list[int]:
    """Return memory limits that are evenly spread between two sizes.

    Raises:
        InputError: The text is no range, or does not go from a smaller size to a larger one.
    """
    first, dots, last = text.partition("..")
    if not dots:
        raise InputError(f"--sweep {text!r} is no range: write two sizes, like 100MB..400MB")
    low, high = parse_bytes(first), parse_bytes(last)
    if low >= high:
        raise InputError(f"--sweep {text!r} must go from a smaller size to a larger one")
    return [low + (high - low) * step // (_STEPS - 1) for step in range(_STEPS)]
