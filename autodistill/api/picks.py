"""`pick`: find the best stored student for some hardware."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from autodistill.api.parameters import takes
from autodistill.api.paths import device_files, each_run, run_folder
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import check_runtime
from autodistill.hardware.budget import LatencyLimit, check_streams, memory_on, parse_latency
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
    parsed,
    read_texts,
)
from autodistill.runs.run_folder import RunFolder
from autodistill.search.request.request import check_room
from autodistill.units import parse_bytes

if TYPE_CHECKING:
    from autodistill.advisor.requirements import Conditions


@dataclass(frozen=True, kw_only=True)
class PickRequest:
    """The arguments of `pick`: hardware, limits, and runs. The fields are documented by `Option.help`."""

    run: Annotated[str | Path | Run | Sequence[str | Path | Run] | None, EACH_RUN] = field(default=None, kw_only=False)
    budget: Annotated[str | int | None, Option(help=f"{BUDGET_HELP}.", metavar="SIZE", parse=parse_bytes)] = None
    device: Annotated[
        str | None,
        Option(help="Device to pick for, like 4090 or local; sets the budget.", metavar="NAME", complete="devices"),
    ] = None
    context: Context = None
    streams: Annotated[
        str | int | Sequence[int] | None,
        Option(
            help="Number of sequences decoded at once (default: 1); with --tiers several numbers, like 1,16.",
            metavar="N",
        ),
    ] = None
    latency: Latency = None
    runtime: ServedBy = None
    min_accuracy: Annotated[
        float | None,
        Option(
            help="Lowest acceptable score, as a fraction: of the metric that ranked the runs if higher is better, else "
            "of accuracy.",
            metavar="X",
        ),
    ] = None
    tiers: Annotated[
        bool,
        Option(
            help="Show the best student for processes of 512 MB to 2 GB and GPUs of 4 to 80 GB. Not with --latency.",
        ),
    ] = False
    devices: Devices = None
    runs: Annotated[
        str | Path | Sequence[str | Path | Run],
        Option(help="Folder that holds the runs.", metavar="DIR", typed=Path, section="Run"),
    ] = RUNS
    cache: Cache = None

    def __post_init__(self) -> None:
        """Refuse a request that is not for either one budget or device, or all tiers."""
        if self.tiers == (self.budget is not None or self.device is not None):
            raise InputError("pick takes --budget or --device (both: the budget on that device), or else --tiers")
        if self.tiers and self.latency is not None:
            raise InputError(
                "--tiers compares memory alone, and latency depends on the device: give --latency with a --device, or "
                "leave it out"
            )
        if len(self.counts) > 1 and not self.tiers:
            raise InputError("several --streams go with --tiers: give one number, or --tiers instead of --budget")
        if isinstance(self.latency, str):
            object.__setattr__(self, "latency", parse_latency(self.latency, self.at_once))
        read_texts(self)
        check_room(self.counts[0] if self.counts else None, self.limits, "--streams")
        if self.runtime is not None:
            check_runtime(self.runtime)

    @cached_property
    def counts(self) -> list[int]:
        """The numbers of sequences that are asked for, without duplicates."""
        asked = self.streams
        words = asked.split(",") if isinstance(asked, str) else [asked] if isinstance(asked, int) else asked or ()
        try:
            return list(dict.fromkeys(check_streams(int(word), "--streams") for word in words))
        except ValueError:
            raise InputError(f"--streams takes a number, or several like 1,16, not {asked!r}") from None

    @property
    def at_once(self) -> int:
        """The number of sequences decoded at once, or the first of several numbers."""
        return self.counts[0] if self.counts else 1

    @property
    def limits(self) -> tuple[LatencyLimit, ...]:
        """The limits of latency."""
        return parsed(self.latency) or ()

    @property
    def places(self) -> tuple[list[str | Path | Run], Path]:
        """The runs that are named, and the folder of runs."""
        named = [self.run] if isinstance(self.run, str | Path | Run) else [*(self.run or ())]
        if isinstance(self.runs, str | Path):
            return named, Path(self.runs)
        if not self.runs:
            raise InputError("the list of runs is empty: give it runs, or the folder that holds them")
        return [*named, *self.runs], RUNS


@takes(PickRequest, "pick")
def pick(**options: Any) -> Pick:
    """Pick the best stored student for some hardware, without training.

    In Python, `runs` also takes a list of runs.

    Raises:
        InputError: There is no such run or device, or arguments contradict each other.
        NothingFitsError: No student fits. The message names the nearest one.
    """
    # Texts are read before looking up a device, because the lookup may measure this machine.
    request = PickRequest(**options)
    files = device_files(request.devices, request.device is not None)
    from autodistill.advisor.requirements import Conditions
    from autodistill.hardware.local import choose_device

    named = LOCAL if request.device is None and request.limits else request.device
    found = None if named is None else choose_device(named, cache_folder(request.cache), files)
    memory = parsed(request.budget)
    asked = Conditions(
        # With --tiers, each tier sets the memory.
        memory_bytes=memory_on(found, memory) if found else memory or 1,
        context=parsed(request.context),
        streams=request.at_once,
        device=found,
        latency=request.limits,
        runtime=request.runtime,
        minimum=request.min_accuracy,
    )
    loads = [replace(asked, streams=count) for count in request.counts or (1,)] if request.tiers else []
    return _picked(asked, *_common_folder(*request.places), cache_folder(request.cache), loads)


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
