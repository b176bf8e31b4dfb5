"""`solve`: how a teacher is stored within a budget at the least loss, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from autodistill.api.paths import as_path, cache_folder, device_files
from autodistill.errors import InputError
from autodistill.hardware.budget import CONTEXT, Budget, DeviceBudget, TierBudget, memory_on, parse_latency
from autodistill.hardware.device import LOCAL
from autodistill.objects.solutions import Solutions
from autodistill.options import Batch, Cache, Context, Devices, Latency, Option
from autodistill.units import parse_bytes

_STEPS = 7  # budgets of a sweep


def solve(
    teacher: Annotated[
        str | Path | None,
        Option(
            help="A transformers folder, a .gguf file, a hub id, or smollm2 (default).",
            metavar="TEACHER",
            argument=True,
        ),
    ] = None,
    *,
    budget: Annotated[
        str | int | None, Option(help="Memory limit for the deployed model, like 16GB or 900MiB.", metavar="SIZE")
    ] = None,
    sweep: Annotated[
        str | None, Option(help=f"Solve for {_STEPS} budgets instead, like 100MB..400MB.", metavar="SIZE..SIZE")
    ] = None,
    device: Annotated[
        str | None,
        Option(
            help='Device that it will run on, like "pi 5" or local; sets the budget.',
            metavar="NAME",
            complete="devices",
        ),
    ] = None,
    latency: Latency = None,
    file_size: Annotated[
        str | int | None, Option(help="Limit of all weights in the file, like 120MB.", metavar="SIZE")
    ] = None,
    tiers: Annotated[bool, Option(help="Solve for GPUs of 4 to 80 GB instead, as pick has them.", typed=bool)] = False,
    data: Annotated[
        str | Path | None,
        Option(help="Text to score on: a folder, a .txt, .jsonl or .parquet file, or pydoc (default).", metavar="REF"),
    ] = None,
    context: Context = None,
    batch: Batch = None,
    tokens: Annotated[
        int, Option(help="Tokens of text to score on; twice as many are held out.", metavar="TOKENS", typed=int)
    ] = 2048,
    sequence_length: Annotated[
        int, Option(help="Length of the sequences that are read.", metavar="TOKENS", typed=int)
    ] = 256,
    out: Annotated[
        str | Path | None,
        Option(help="Folder for the result, and for the solution with --export.", metavar="DIR", typed=Path),
    ] = None,
    export: Annotated[
        bool, Option(help="Write the solution as a GGUF file and verify it in llama.cpp.", typed=bool)
    ] = False,
    plan: Annotated[
        bool, Option(help="Say what solving would take on this machine, and solve nothing.", typed=bool)
    ] = False,
    candidate: Annotated[
        str | Path | Sequence[str | Path] | None,
        Option(
            help="Measure this GGUF file of the same model too, and take it if it is better; may be repeated.",
            metavar="FILE",
            typed=list[str],
        ),
    ] = None,
    devices: Devices = None,
    cache: Cache = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Solutions:
    """Choose the storage type of every matrix, table and cache that costs least within a budget. Nothing is trained.

    Raises:
        InputError: No such teacher, data or device, a model that llama.cpp cannot hold, a candidate of another model,
            or arguments that contradict each other.
        NothingFitsError: No budget holds the smallest storage, or what was written takes more than the budget.
        VerificationError: What was written is not what was measured.
    """
    one = parse_bytes(budget) if isinstance(budget, str) else budget
    load: dict[str, Any] = {"context": CONTEXT if context is None else context, "batch": 1 if batch is None else batch}
    limits_of_time = parse_latency(latency, load["batch"]) if isinstance(latency, str) else latency
    if limits_of_time:
        if tiers:
            raise InputError("--tiers compares memory alone, and latency depends on the device: leave --latency out")
        load["latency"] = limits_of_time
        device = LOCAL if device is None else device
    files = device_files(devices, device is not None)
    budgets = _budgets(one, sweep, device, load, tiers=tiers, files=files, cache=cache_folder(cache))
    from autodistill.search.solve import SolveRequest, plan_solve
    from autodistill.search.solve import solve as solved

    named = {name: str(value) for name, value in (("teacher", teacher), ("data", data)) if value is not None}
    request = SolveRequest(
        budgets=tuple(budgets),
        cache=cache_folder(cache),
        tokens=tokens,
        sequence_length=sequence_length,
        out=as_path(out),
        export=export,
        candidates=tuple(map(Path, [candidate] if isinstance(candidate, str | Path) else candidate or ())),
        file_bytes=parse_bytes(file_size) if isinstance(file_size, str) else file_size,
        context_by_default=context is None,
        **named,
    )
    return Solutions(plan_solve(request) if plan else solved(request, notify))


def _budgets(
    budget: int | None,
    sweep: str | None,
    device: str | None,
    load: Mapping[str, Any],
    *,
    tiers: bool,
    files: Sequence[Path],
    cache: Path,
) -> list[Budget]:
    """Return the budgets that are asked for, at some context and batch."""
    if budget is not None and sweep is not None:
        raise InputError("--budget is one limit and --sweep several: give one of the two")
    if tiers and (budget, sweep, device) != (None, None, None):
        raise InputError("--tiers has the memory of GPUs for its budgets: leave --budget, --sweep and --device out")
    if not tiers and (budget, sweep, device) == (None, None, None):
        raise InputError("solve takes --budget like 200MB, --sweep like 100MB..400MB, --device like local, or --tiers")
    if tiers:
        from autodistill.advisor.pick import TIERS, tier_of
        from autodistill.hardware.catalog import listed

        known = [tier_of(size, listed()) for size in TIERS]
        return [
            TierBudget(memory_bytes=tier.usable_bytes, tier_bytes=tier.nominal_bytes, least_device=tier.device, **load)
            for tier in known
        ]
    limits: Sequence[int | None] = [budget] if sweep is None else _sweep(sweep)
    if device is None:
        return [Budget(memory_bytes=limit or 0, **load) for limit in limits]
    from autodistill.hardware.local import choose_device

    found = choose_device(device, cache, files)
    return [DeviceBudget(memory_bytes=memory_on(found, limit), device=found, **load) for limit in limits]


def _sweep(text: str) -> list[int]:
    """Limits that are evenly spread between two sizes."""
    first, dots, last = text.partition("..")
    if not dots:
        raise InputError(f"--sweep {text!r} is no range: write two sizes, like 100MB..400MB")
    low, high = parse_bytes(first), parse_bytes(last)
    if low >= high:
        raise InputError(f"--sweep {text!r} must go from a smaller size to a larger one")
    return [low + (high - low) * step // (_STEPS - 1) for step in range(_STEPS)]
