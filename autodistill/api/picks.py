"""`pick`: find the best stored student for some hardware."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from autodistill.api.paths import device_files, each_run, run_folder
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import check_runtime
from autodistill.hardware.budget import check_streams, memory_on, parse_latency
from autodistill.hardware.device import LOCAL
from autodistill.objects.answers import Pick
from autodistill.objects.run import Run
from autodistill.options import (
    BUDGET_HELP,
    EACH_RUN,
    RUNS,
    Cache,
    Context,
    Devices,
    Latency,
    Option,
    ServedBy,
    cache_folder,
)
from autodistill.runs.run_folder import RunFolder
from autodistill.search.request.request import check_room
from autodistill.units import parse_bytes, parse_tokens

if TYPE_CHECKING:
    from autodistill.advisor.requirements import Conditions


def pick(
    run: Annotated[
        Sequence[str | Path | Run] | None,
        EACH_RUN,
    ] = None,
    *,
    budget: Annotated[str | int | None, Option(help=f"{BUDGET_HELP}.", metavar="SIZE")] = None,
    device: Annotated[
        str | None,
        Option(help="Device to pick for, like 4090 or local; sets the budget.", metavar="NAME", complete="devices"),
    ] = None,
    context: Context = None,
    streams: Annotated[
        str | int | Sequence[int] | None,
        Option(
            help="Number of sequences decoded at once (default: 1); with --tiers several numbers, like 1,16.",
            metavar="N",
        ),
    ] = None,
    latency: Latency = None,
    runtime: ServedBy = None,
    min_accuracy: Annotated[
        float | None,
        Option(
            help="Lowest acceptable score, as a fraction: of the metric that ranked the runs if higher is better, else "
            "of accuracy.",
            metavar="X",
        ),
    ] = None,
    tiers: Annotated[
        bool,
        Option(
            help="Show the best student for processes of 512 MB to 2 GB and GPUs of 4 to 80 GB. Not with --latency.",
        ),
    ] = False,
    devices: Devices = None,
    runs: Annotated[
        str | Path | Sequence[str | Path | Run],
        Option(help="Folder that holds the runs.", metavar="DIR", typed=Path, section="Run"),
    ] = RUNS,
    cache: Cache = None,
) -> Pick:
    """Pick the best stored student for some hardware, without training.

    In Python, `runs` also takes a list of runs.

    Raises:
        InputError: There is no such run or device, or arguments contradict each other.
        NothingFitsError: No student fits. The message names the nearest one.
    """
    _check_hardware(tiers=tiers, latency=latency is not None, single=budget is not None or device is not None)
    # Parse numbers before looking up a device, because the lookup may measure this machine.
    memory = parse_bytes(budget) if isinstance(budget, str) else budget
    counts = _counts(streams)
    if len(counts) > 1 and not tiers:
        raise InputError("several --streams go with --tiers: give one number, or --tiers instead of --budget")
    at_once = counts[0] if counts else 1
    limits = parse_latency(latency, at_once) if isinstance(latency, str) else latency or ()
    check_room(counts[0] if counts else None, limits, "--streams")
    if runtime is not None:
        check_runtime(runtime)
    room = parse_tokens(context) if isinstance(context, str) else context
    files = device_files(devices, device is not None)
    from autodistill.advisor.requirements import Conditions
    from autodistill.hardware.local import choose_device

    named = LOCAL if device is None and limits else device
    found = None if named is None else choose_device(named, cache_folder(cache), files)
    asked = Conditions(
        # With --tiers, each tier sets the memory.
        memory_bytes=memory_on(found, memory) if found else memory or 1,
        context=room,
        streams=at_once,
        device=found,
        latency=limits,
        runtime=runtime,
        minimum=min_accuracy,
    )
    loads = [replace(asked, streams=count) for count in counts or (1,)] if tiers else []
    chosen = [run] if isinstance(run, str | Path | Run) else [*(run or ())]
    if not isinstance(runs, str | Path):
        if not runs:
            raise InputError("the list of runs is empty: give it runs, or the folder that holds them")
        chosen, runs = [*chosen, *runs], RUNS
    return _picked(asked, *_common_folder(chosen, Path(runs)), cache_folder(cache), loads)


def _check_hardware(*, tiers: bool, latency: bool, single: bool) -> None:
    """Refuse a request that is not for either one budget or device, or all tiers.

    Args:
        tiers, latency: Whether --tiers and --latency are given.
        single: Whether --budget or --device is given.
    """
    if tiers == single:
        raise InputError("pick takes --budget or --device (both: the budget on that device), or else --tiers")
    if tiers and latency:
        raise InputError(
            "--tiers compares memory alone, and latency depends on the device: give --latency with a --device, or "
            "leave it out"
        )


def _counts(streams: str | int | Sequence[int] | None) -> list[int]:
    """Return the requested numbers of sequences, without duplicates."""
    words = streams.split(",") if isinstance(streams, str) else [streams] if isinstance(streams, int) else streams or ()
    try:
        return list(dict.fromkeys(check_streams(int(word), "--streams") for word in words))
    except ValueError:
        raise InputError(f"--streams takes a number, or several like 1,16, not {streams!r}") from None


def _picked(asked: Conditions, folder: Path, names: Sequence[str], cache: Path, loads: Sequence[Conditions]) -> Pick:
    """Pick among the stored rows of some runs, for one budget, or for each load and tier if loads are given."""
    from autodistill.advisor.candidates import recalibrated_by, stored
    from autodistill.advisor.measurements import read_measured
    from autodistill.advisor.pick import all_tiers, pick_tiers
    from autodistill.advisor.pick import pick as best
    from autodistill.hardware.catalog import listed

    with _without_gc():
        rows = stored(folder, names)
        timed = tuple(read_measured(folder)) if asked.device else ()
        conditions = replace(asked, overheads=recalibrated_by(rows), measured=timed)
        answers = [pick_tiers(rows, replace(conditions, streams=one.streams), all_tiers(listed())) for one in loads]
        for answer in answers:
            for one in answer["tiers"]:
                load = replace(conditions, streams=answer["streams"], device=None, gpu=one["gpu"])
                one["solved"] = _solved_before(one["pick"], folder, one["usable_bytes"], load, cache)
        if answers:
            return Pick(answers[0] if len(answers) == 1 else {"loads": answers}, folder)
        answer = best(rows, conditions)
    solved = _solved_before(answer["pick"], folder, conditions.memory_bytes, conditions, cache)
    command = None if solved else _solve_command(answer["pick"], folder, conditions)
    answer |= {"next": _export_hint(answer["pick"], folder), "solved": solved, "solve": command}
    return Pick(answer, folder)


def _solved_before(
    picked: Mapping[str, Any] | None, runs: Path, limit: int, conditions: Conditions, cache: Path
) -> Mapping[str, Any] | None:
    """Return what `solve` found earlier within the same memory, for the teacher of the picked row's run."""
    from autodistill.advisor.solved import solved_within

    known = RunFolder.open(runs, picked["run"]).read_settings().get("teacher", {}) if picked else {}
    if picked is None or "fingerprint" not in known:
        return None
    load = {"context": picked["context"], "batch": conditions.streams, "on_gpu": conditions.on_gpu}
    return solved_within(cache, known["fingerprint"], limit, **load)


def _solve_command(picked: Mapping[str, Any], runs: Path, conditions: Conditions) -> str | None:
    """Return the command that solves for the same memory of a process; None for a GPU, or without teacher and data."""
    settings = RunFolder.open(runs, picked["run"]).read_settings()
    named = [settings.get(part, {}).get("reference") for part in ("teacher", "data")]
    if None in named or conditions.on_gpu:  # its memory is not that of a process
        return None
    limit = conditions.memory_bytes
    budget = f"{limit // 10**6}MB" if limit % 10**6 == 0 else f"{limit}B"
    words = ["autodistill", "solve", named[0], "--budget", budget, "--data", named[1]]
    words += ["--context", str(picked["context"])]
    words += ["--batch", str(conditions.streams)] if conditions.streams > 1 else []
    return shlex.join(words)


def _common_folder(runs: Sequence[str | Path | Run], out: Path) -> tuple[Path, list[str]]:
    """Return the folder that holds some runs, and their names.

    Raises:
        InputError: The runs lie in several folders.
    """
    if not any(isinstance(run, Run | Path) or "/" in run for run in runs):
        return out, each_run(map(str, runs), out)
    folders = [run_folder(run, out) for run in runs]
    parents = {folder.path.parent for folder in folders}
    if len(parents) > 1:
        told = ", ".join(sorted(map(str, parents)))
        raise InputError(f"these runs lie in several folders ({told}): pick from the runs of one folder")
    return parents.pop(), [folder.name for folder in folders]


def _export_hint(picked: Mapping[str, Any], runs: Path) -> str:
    """Return a sentence that tells how to export the picked row's model to a file or a folder."""
    from autodistill.quantization.formats import get_format
    from autodistill.runs.students import student_folder

    run, row = RunFolder.open(runs, picked["run"]), picked["row_id"]
    if picked["kind"] != "teacher" and not student_folder(run.checkpoints / picked["trial"]).is_dir():
        return f"Its student is not on this disk ({run.checkpoints / picked['trial']}), so it cannot be exported here."
    words = [
        "autodistill",
        "export",
        picked["run"],
        "--row",
        row,
        "--to",
        get_format(picked["format"]).container_for(picked["runtime"]),
    ]
    words += ["--out", f"students/{row}", *([] if runs == RUNS else ["--runs", str(runs)])]
    return f"To get it: {shlex.join(words)}"


@contextmanager
def _without_gc() -> Iterator[None]:
    """Turn the garbage collector off for the block. It would take a tenth of the time, and find nothing to free."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            # Without this, everything just read would be in the young generation, and scanned at once.
            gc.freeze()
            gc.unfreeze()
            gc.enable()
