"""What a Python user calls, and the command line too: each argument is declared here or in `SearchRequest`, once."""

from __future__ import annotations

import gc
import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeAlias, TypeVar, get_type_hints

from autodistill.errors import InputError
from autodistill.hardware.budget import (
    CONTEXT,
    Budget,
    DeviceBudget,
    Price,
    TierBudget,
    check_streams,
    memory_on,
    parse_latency,
    parse_price,
)
from autodistill.hardware.device import LOCAL, Device
from autodistill.objects.answers import Estimate, Pick
from autodistill.objects.run import Run, SearchResult, lines, run_search
from autodistill.objects.solutions import Solutions
from autodistill.options import (
    BUDGET_HELP,
    RUNS,
    TEACHER,
    Batch,
    Cache,
    Context,
    Devices,
    Latency,
    Option,
    Out,
    options_of,
)
from autodistill.runs.run_folder import RunFolder, default_cache
from autodistill.search.request.request import DEFAULT_TEACHER, SearchRequest, check_room
from autodistill.strategy.strategy import Strategy
from autodistill.units import parse_bytes, parse_duration

if TYPE_CHECKING:
    from autodistill.advisor.describe import Described
    from autodistill.advisor.requirements import Wanted

P = ParamSpec("P")
R = TypeVar("R")
Strategies: TypeAlias = str | Path | Strategy

RUN_SHAPE = "A shape in the place of MODEL"
_STEPS = 7  # budgets of a sweep
_SIZES = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "experts", "active_experts", "window")


def _takes(request: Callable[P, SearchRequest], verb: str) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a function the parameters that a request declares for a verb: names, types, defaults and help."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        declared = inspect.signature(request).parameters
        taken = options_of(request, verb)
        own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
        hints = get_type_hints(request)
        shared = [
            declared[name].replace(annotation=hints[name]) for name in taken if not any(one.name == name for one in own)
        ]
        signature = inspect.Signature([*own, *shared])

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            return function(*bound.args, **bound.kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        told = (f"    {name}: {option.helps.get(verb, option.help)}" for name, option in taken.items())
        call.__doc__ = "\n".join([f"{inspect.getdoc(function)}", "", "Args:", *told])
        return call

    return decorate


@_takes(SearchRequest, "search")
def search(**options: Any) -> SearchResult:
    """Find, export and verify the best student that fits a hardware budget."""
    return run_search(_request("search", options))


def _distill(strategy: Strategies, **options: Any) -> SearchResult:
    """Train, export and verify the student of one strategy, without a search."""
    return run_search(_request("distill", {"strategy": strategy, **options}))


def _concatenated(request: Callable[P, SearchRequest]) -> Callable[Concatenate[Strategies, P], SearchResult]:
    return _takes(request, "distill")(_distill)  # type: ignore[return-value]


distill = _concatenated(SearchRequest)


@_takes(SearchRequest, "plan")
def plan(price: str | Price | None = None, **options: Any) -> dict[str, Any]:
    """Say what a search would do: trials, tokens, disk, time, and its cost at a price an hour. Nothing is trained."""
    from autodistill.search.search import plan_search

    hourly = parse_price(price) if isinstance(price, str) else price
    return plan_search(_request("plan", options), lines(), hourly)


def _request(verb: str, options: Mapping[str, Any]) -> SearchRequest:
    """The request of a call, with the command line that says the same."""
    words = ["autodistill", verb]
    declared = options_of(SearchRequest)
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        if value is None or value is False or not all(isinstance(one, str | int | float | Path) for one in values):
            continue  # what no command line can say
        flag = [] if declared[name].argument else [f"--{name.replace('_', '-')}"]
        words += [word for one in values for word in (flag if value is True else [*flag, str(one)])]
    return SearchRequest(**options, command=shlex.join(words))


def load_run(run: str | Path, *, out: str | Path = RUNS) -> Run:
    """Open a run that is on disk, finished or under way, without training.

    Args:
        run: Its folder, or its name.
        out: Folder that holds the runs, for a name.

    Raises:
        InputError: There is no such run; the known ones are listed.
    """
    return Run(_folder(run, Path(out)))


def _folder(run: str | Path | Run, out: Path) -> RunFolder:
    if isinstance(run, Run):
        return RunFolder.open(run.path.parent, run.name)
    path = Path(run).expanduser()
    if isinstance(run, Path) or len(path.parts) > 1:
        return RunFolder.open(path.absolute().parent, path.absolute().name)
    return RunFolder.open(out, str(run))


def estimate(
    model: Annotated[
        str | Path | None,
        Option(help="A transformers folder, a .gguf file, a hub id, or smollm2.", metavar="MODEL", argument=True),
    ] = None,
    *,
    format: Annotated[
        str | None,
        Option(
            help="Format of the weights, like gguf-q4_0 (default: the grid of --strategy or of a packed MODEL, else "
            "gguf-q8_0).",
            metavar="NAME",
            complete="formats",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        Option(help="Another runtime that serves the format, or onnxruntime (memory only).", metavar="NAME"),
    ] = None,
    context: Context = None,
    batch: Batch = None,
    kv_type: Annotated[str, Option(help="Type of the KV cache: f16, q8_0 or q4_0.", metavar="TYPE")] = "f16",
    prompt: Annotated[
        int | None,
        Option(help="Length of the prompt before the first token (default: 512).", metavar="TOKENS", typed=int),
    ] = None,
    training: Annotated[
        int | None,
        Option(
            help="Estimate the memory of training too, with passes of this many tokens (default: 1024 with "
            "--strategy, else no training).",
            metavar="TOKENS",
            typed=int,
        ),
    ] = None,
    strategy: Annotated[
        Strategies | None,
        Option(
            help="Estimate the student that this strategy makes of MODEL, and training it: a name, or a .yaml file.",
            metavar="STRATEGY",
            complete="strategies",
        ),
    ] = None,
    device: Annotated[
        str | None,
        Option(help="Device to estimate the speed on, like 4090 or local.", metavar="NAME", complete="devices"),
    ] = None,
    all_devices: Annotated[bool, Option(help="Estimate the speed on every known device.", typed=bool)] = False,
    devices: Devices = None,
    layers: Annotated[int | None, Option(help="Number of layers.", metavar="N", typed=int, section=RUN_SHAPE)] = None,
    width: Annotated[
        int | None, Option(help="Width of the hidden states.", metavar="N", typed=int, section=RUN_SHAPE)
    ] = None,
    heads: Annotated[
        int | None, Option(help="Number of attention heads.", metavar="N", typed=int, section=RUN_SHAPE)
    ] = None,
    kv_heads: Annotated[
        int | None,
        Option(help="Number of key-value heads (default: as --heads).", metavar="N", typed=int, section=RUN_SHAPE),
    ] = None,
    head_dim: Annotated[
        int | None,
        Option(help="Width of each head (default: width / heads).", metavar="N", typed=int, section=RUN_SHAPE),
    ] = None,
    ffn: Annotated[
        int | None,
        Option(help="Feed-forward neurons of a layer, or of an expert.", metavar="N", typed=int, section=RUN_SHAPE),
    ] = None,
    vocab: Annotated[
        int | None, Option(help="Size of the vocabulary.", metavar="N", typed=int, section=RUN_SHAPE)
    ] = None,
    experts: Annotated[
        int | None, Option(help="Number of experts of a mixture.", metavar="N", typed=int, section=RUN_SHAPE)
    ] = None,
    active_experts: Annotated[
        int | None,
        Option(help="Number of experts used for each token.", metavar="N", typed=int, section=RUN_SHAPE),
    ] = None,
    window: Annotated[
        int | None,
        Option(
            help="Window of sliding attention in all layers, which GGUF cannot hold.",
            metavar="TOKENS",
            typed=int,
            section=RUN_SHAPE,
        ),
    ] = None,
    tied: Annotated[
        bool, Option(help="The output layer shares the embedding table.", typed=bool, section=RUN_SHAPE)
    ] = False,
    out: Out = RUNS,
    cache: Cache = None,
) -> Estimate:
    """Predict the memory and speed of a model without loading it. Measurements stored in --out correct it.

    Raises:
        InputError: No such model, format or device, or arguments that contradict each other.
    """
    sizes = dict(
        zip(
            _SIZES,
            (layers, width, heads, kv_heads, head_dim, ffn, vocab, experts, active_experts, window),
            strict=True,
        )
    )
    if (model is None) == all(size is None for size in sizes.values()):
        raise InputError("estimate takes either a MODEL or a shape, like --layers 22 --width 2048 --heads 32 ...")
    if tied and model is not None:
        raise InputError("--tied applies to a shape given in numbers; a MODEL says itself whether its head is tied")
    if device is not None and all_devices:
        raise InputError("--device names one device and --all-devices all of them: give one of the two")
    asked = device is not None or all_devices
    if prompt is not None and not asked:
        raise InputError(
            "--prompt sets the time to the first token, which depends on the device: name one with --device"
        )
    at_once = 1 if batch is None else check_streams(batch, "--batch")
    files = _own(devices, asked)
    from autodistill.advisor.candidates import recalibrated
    from autodistill.advisor.describe import deployment_named, describe, shape
    from autodistill.advisor.estimate import appraise
    from autodistill.hardware.local import choose_device, known_devices

    found = known_devices(files) if all_devices else ()
    if device is not None:
        found = (choose_device(device, _cache(cache), files),)
    described = shape(sizes, tied=tied) if model is None else describe(str(model))
    load: dict[str, Any] = {"batch": at_once, "context": context, "kv_type": kv_type, "runtime": runtime}
    load |= {"prompt": prompt, "devices": found, "overheads": recalibrated(Path(out))}
    if strategy is not None:
        return Estimate(_student_estimated(described, strategy, format, training, load))
    if format:
        described = replace(described, weights_bytes=None)
    deployment = deployment_named(format or described.format_name or "gguf-q8_0")
    return Estimate(appraise(described, deployment, training=training, **load))


def _student_estimated(
    teacher: Described, strategy: Strategies, format_name: str | None, training: int | None, load: Mapping[str, Any]
) -> dict[str, Any]:
    """What the student that a strategy makes takes, served on its own grid or a named one, and trained."""
    from autodistill.advisor.describe import deployment_named
    from autodistill.advisor.estimate import TOKENS, appraise, strategy_training, student_of
    from autodistill.distillation.student.check import own_deployment
    from autodistill.strategy.named import load_strategy

    recipe = strategy if isinstance(strategy, Strategy) else load_strategy(strategy)
    student = student_of(teacher, recipe, recipe.id if isinstance(strategy, Strategy) else str(strategy))
    named = None if format_name is None else deployment_named(format_name)
    deployment = named or own_deployment(recipe) or deployment_named("gguf-q8_0")
    trained = strategy_training(teacher, student, recipe, tokens=TOKENS if training is None else training)
    return appraise(student, deployment, **load) | {"training": trained}


def pick(
    runs: Annotated[
        Sequence[str | Path | Run] | None,
        Option(help="Names of runs (default: all).", metavar="RUN", typed=list[str], argument=True, complete="runs"),
    ] = None,
    *,
    budget: Annotated[str | int | None, Option(help=f"{BUDGET_HELP}.", metavar="SIZE")] = None,
    device: Annotated[
        str | None,
        Option(help="Device to pick for, like 4090 or local; sets the budget.", metavar="NAME", complete="devices"),
    ] = None,
    context: Context = None,
    streams: Annotated[
        int | None, Option(help="Number of sequences decoded at once (default: 1).", metavar="N", typed=int)
    ] = None,
    latency: Latency = None,
    min_accuracy: Annotated[
        float | None,
        Option(
            help="Lowest acceptable score, as a fraction: of the metric that ranked the runs if higher is better, else "
            "of accuracy.",
            metavar="X",
            typed=float,
        ),
    ] = None,
    tiers: Annotated[
        bool, Option(help="Show the best for GPUs of 4 to 80 GB instead. Not with --latency.", typed=bool)
    ] = False,
    devices: Devices = None,
    out: Out = RUNS,
    cache: Cache = None,
) -> Pick:
    """Pick the best stored student for some hardware, without training.

    Raises:
        InputError: No such run or device, or arguments that contradict each other.
        NothingFitsError: Nothing fits; the message has the nearest.
    """
    from autodistill.advisor.candidates import recalibrated_by, stored
    from autodistill.advisor.measurements import read_measured
    from autodistill.advisor.pick import TIERS, pick_tiers, tier_of
    from autodistill.advisor.pick import pick as best
    from autodistill.advisor.requirements import Wanted
    from autodistill.hardware.catalog import listed
    from autodistill.hardware.local import choose_device

    if tiers == (budget is not None or device is not None):
        raise InputError("pick takes --budget or --device (both: the budget on that device), or else --tiers")
    if tiers and latency is not None:
        raise InputError(
            "--tiers compares memory alone, and latency depends on the device: give --latency with a --device, or "
            "leave it out"
        )
    # Numbers are read before a device is looked for, since that may measure this machine.
    memory = parse_bytes(budget) if isinstance(budget, str) else budget
    at_once = 1 if streams is None else check_streams(streams, "--streams")
    limits = parse_latency(latency, at_once) if isinstance(latency, str) else latency or ()
    check_room(streams, limits, "--streams")
    files = _own(devices, device is not None)
    named = LOCAL if device is None and limits else device
    found = None if named is None else choose_device(named, _cache(cache), files)
    asked = Wanted(
        # With tiers each of them is the memory.
        memory_bytes=memory_on(found, memory) if found else memory or 1,
        context=context,
        streams=at_once,
        device=found,
        latency=limits,
        least=min_accuracy,
    )
    with _no_collection():
        folder, names = _together(runs or (), Path(out))
        rows = stored(folder, names)
        timed = tuple(read_measured(folder)) if found else ()
        wanted = replace(asked, overheads=recalibrated_by(rows), measured=timed)
        if tiers:
            answer = pick_tiers(rows, wanted, [tier_of(size, listed()) for size in TIERS])
            on_gpus = replace(wanted, device=None, gpu=True)
            for one in answer["tiers"]:
                one["solved"] = _solved_before(one["pick"], folder, one["usable_bytes"], on_gpus, _cache(cache))
            return Pick(answer, folder)
        answer = best(rows, wanted)
    solved = _solved_before(answer["pick"], folder, wanted.memory_bytes, wanted, _cache(cache))
    return Pick(answer | {"next": _to_get(answer["pick"], folder), "solved": solved}, folder)


def _solved_before(
    picked: Mapping[str, Any] | None, runs: Path, limit: int, wanted: Wanted, cache: Path
) -> Mapping[str, Any] | None:
    """What `solve` found earlier for the teacher of the run of a row that was picked, within the same memory."""
    from autodistill.advisor.solved import solved_within

    known = RunFolder.open(runs, picked["run"]).asked().get("teacher", {}) if picked else {}
    if picked is None or "fingerprint" not in known:
        return None
    load = {"context": picked["context"], "batch": wanted.streams, "on_gpu": wanted.on_gpu}
    return solved_within(cache, known["fingerprint"], limit, **load)


def _together(runs: Sequence[str | Path | Run], out: Path) -> tuple[Path, list[str]]:
    """The folder that holds some runs, and their names."""
    if not any(isinstance(run, Run | Path) or "/" in run for run in runs):
        return out, [str(run) for run in runs]
    folders = [_folder(run, out) for run in runs]
    parents = {folder.path.parent for folder in folders}
    if len(parents) > 1:
        told = ", ".join(sorted(map(str, parents)))
        raise InputError(f"these runs lie in several folders ({told}): pick from the runs of one folder")
    return parents.pop(), [folder.name for folder in folders]


def _to_get(picked: Mapping[str, Any], runs: Path) -> str:
    """How to have the model of a row that was picked as a file or a folder."""
    from autodistill.quantization.formats import get_format
    from autodistill.runs.students import student_folder

    run, row = RunFolder.open(runs, picked["run"]), picked["row_id"]
    if picked["kind"] != "teacher" and not student_folder(run.checkpoints / picked["trial"]).is_dir():
        return f"Its student is not on this disk ({run.checkpoints / picked['trial']}), so it cannot be exported here."
    words = ["autodistill", "export", picked["run"], "--row", row, "--to", get_format(picked["format"]).container]
    words += ["--out", f"students/{row}", *([] if runs == RUNS else ["--runs", str(runs)])]
    return f"To get it: {shlex.join(words)}"


@contextmanager
def _no_collection() -> Iterator[None]:
    """Makes no search for cycles of garbage, a tenth of the time where much is read of which nothing is given up."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            # Else all that was read would be young, and searched at once.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


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
    if budget is not None and sweep is not None:
        raise InputError("--budget is one limit and --sweep several: give one of the two")
    limits_of_time = parse_latency(latency, 1 if batch is None else batch) if isinstance(latency, str) else latency
    if tiers and limits_of_time:
        raise InputError("--tiers compares memory alone, and latency depends on the device: leave --latency out")
    device = LOCAL if device is None and limits_of_time else device
    if tiers and not budget is sweep is device is None:
        raise InputError("--tiers has the memory of GPUs for its budgets: leave --budget, --sweep and --device out")
    if not tiers and budget is sweep is device is None:
        raise InputError("solve takes --budget like 200MB, --sweep like 100MB..400MB, --device like local, or --tiers")
    one = parse_bytes(budget) if isinstance(budget, str) else budget
    limits: Sequence[int | None] = [one] if sweep is None else _sweep(sweep)
    files = _own(devices, device is not None)
    load: dict[str, Any] = {
        "context": CONTEXT if context is None else context,
        "batch": 1 if batch is None else batch,
    }
    budgets: list[Budget]
    if tiers:
        from autodistill.advisor.pick import TIERS, tier_of
        from autodistill.hardware.catalog import listed

        known = [tier_of(size, listed()) for size in TIERS]
        budgets = [
            TierBudget(memory_bytes=tier.usable_bytes, tier_bytes=tier.nominal_bytes, least_device=tier.device, **load)
            for tier in known
        ]
    elif device is None:
        budgets = [Budget(memory_bytes=limit or 0, **load) for limit in limits]
    else:
        from autodistill.hardware.local import choose_device

        found = choose_device(device, _cache(cache), files)
        load["latency"] = limits_of_time or ()
        budgets = [DeviceBudget(memory_bytes=memory_on(found, limit), device=found, **load) for limit in limits]
    from autodistill.search.solve import SolveRequest, plan_solve
    from autodistill.search.solve import solve as solved

    named = {name: str(value) for name, value in (("teacher", teacher), ("data", data)) if value is not None}
    request = SolveRequest(
        budgets=tuple(budgets),
        cache=_cache(cache),
        tokens=tokens,
        sequence_length=sequence_length,
        out=_path(out),
        export=export,
        candidates=tuple(map(Path, [candidate] if isinstance(candidate, str | Path) else candidate or ())),
        file_bytes=parse_bytes(file_size) if isinstance(file_size, str) else file_size,
        context_by_default=context is None,
        **named,
    )
    return Solutions(plan_solve(request) if plan else solved(request, notify))


def _sweep(text: str) -> list[int]:
    """Limits that are evenly spread between two sizes."""
    first, dots, last = text.partition("..")
    if not dots:
        raise InputError(f"--sweep {text!r} is no range: write two sizes, like 100MB..400MB")
    low, high = parse_bytes(first), parse_bytes(last)
    if low >= high:
        raise InputError(f"--sweep {text!r} must go from a smaller size to a larger one")
    return [low + (high - low) * step // (_STEPS - 1) for step in range(_STEPS)]


def measure(
    student: Annotated[
        str | Path,
        Option(help="A .gguf file, or a transformers folder.", metavar="STUDENT", typed=Path, argument=True),
    ],
    *,
    on: Annotated[
        str | None, Option(help="Measure on a board, like ssh://pi@raspberrypi.local.", metavar="ssh://HOST")
    ] = None,
    script: Annotated[
        str | Path | None,
        Option(help="Write a script to run on a board without ssh.", metavar="FILE", typed=Path),
    ] = None,
    result: Annotated[
        str | Path | None, Option(help="Read what that script printed.", metavar="FILE", typed=Path)
    ] = None,
    bench: Annotated[str | None, Option(help="Path of llama-bench on the board.", metavar="PATH")] = None,
    device: Annotated[
        str | None,
        Option(help="Which device the board is (default: found by its own name).", metavar="NAME", complete="devices"),
    ] = None,
    ssh_config: Annotated[
        str | Path | None, Option(help="ssh configuration to use instead of your own.", metavar="FILE", typed=Path)
    ] = None,
    context: Annotated[
        int | None,
        Option(
            help="Measured here: context of each stream (default: 2048, or the student's limit).",
            metavar="TOKENS",
            typed=int,
        ),
    ] = None,
    streams: Annotated[
        str | Sequence[int],
        Option(help="Measured here: numbers of sequences decoded at once, like 1,4,16.", metavar="N,..."),
    ] = "1",
    prompt: Annotated[
        int | None,
        Option(help="Length of the prompt before the first token (default: 512).", metavar="TOKENS", typed=int),
    ] = None,
    decoded: Annotated[
        int | None, Option(help="Length of an answer (default: 64).", metavar="TOKENS", typed=int)
    ] = None,
    rounds: Annotated[int | None, Option(help="Number of repetitions (default: 3).", metavar="N", typed=int)] = None,
    threads: Annotated[int, Option(help="CPU threads; 0 uses every core.", metavar="N", typed=int, least=0)] = 0,
    timeout: Annotated[
        str | float | None, Option(help="Stop waiting for a board after this long (default: 30m).", metavar="TIME")
    ] = None,
    busy: Annotated[bool, Option(help="Measure even if the machine is busy, and mark the result.", typed=bool)] = False,
    devices: Devices = None,
    out: Out = RUNS,
    cache: Cache = None,
) -> dict[str, Any]:
    """Measure a student's speed and memory, here or on a board with llama-bench. pick uses the results.

    Returns:
        Plain data: what was measured and what had been predicted; of `script`, where it was written.

    Raises:
        InputError: A student that cannot be read, arguments that change nothing here, or a busy machine.
        RemoteError: A board that is not reached, or fails.
    """
    counts = streams
    if isinstance(counts, str):
        words = [word.strip() for word in counts.split(",")]
        if not all(word.isascii() and word.isdigit() and len(word) < 20 for word in words):
            raise InputError(f"--streams {counts!r} must be numbers separated by commas, like 1,4,16")
        counts = [int(word) for word in words]
    seconds = parse_duration(timeout) if isinstance(timeout, str) else timeout
    from autodistill.advisor.measure import MeasureRequest
    from autodistill.advisor.measure import measure as measured

    return measured(
        MeasureRequest(
            student=Path(student),
            out=Path(out),
            on=on,
            script=_path(script),
            result=_path(result),
            bench=bench,
            device=device,
            own=[Path(file) for file in devices or ()],
            ssh_config=_path(ssh_config),
            context=context,
            streams=tuple(counts),
            prompt=prompt,
            decoded=decoded,
            rounds=rounds,
            threads=threads,
            cache=_cache(cache),
            timeout=seconds,
            busy=busy,
        )
    )


def write(
    *,
    prompts: Annotated[
        str | Path,
        Option(
            help="Prompts to answer: a .jsonl file, a .txt file with one prompt per line, or reasoning-gym:TASK.",
            metavar="REF",
        ),
    ],
    out: Annotated[
        str | Path,
        Option(help="The .jsonl file to write; answers already in it are kept.", metavar="FILE", typed=Path),
    ],
    teacher: Annotated[str | Path | None, TEACHER] = None,
    endpoint: Annotated[
        str | None, Option(help="Address of an OpenAI-compatible API, like http://localhost:8000/v1.", metavar="URL")
    ] = None,
    model: Annotated[str | None, Option(help="Name of the model at the endpoint.", metavar="NAME")] = None,
    max_tokens: Annotated[
        int, Option(help="Longest answer; answers cut off here are not trained on.", metavar="N", typed=int)
    ] = 256,
    temperature: Annotated[
        float, Option(help="Sampling temperature; 0 takes the most likely token.", metavar="T", typed=float)
    ] = 0.0,
    top_p: Annotated[
        float,
        Option(help="Sample from the most likely tokens that add up to this probability.", metavar="P", typed=float),
    ] = 1.0,
    seed: Annotated[int, Option(help="Seed of the sampling.", metavar="N", typed=int, least=0)] = 0,
    top_k: Annotated[
        int,
        Option(help="Number of log-probabilities to request from the endpoint for each token.", metavar="N", typed=int),
    ] = 0,
    batch: Annotated[
        int | None,
        Option(
            help="Number of answers written at once (default: 8 at an endpoint, what suits the device here).",
            metavar="N",
            typed=int,
        ),
    ] = None,
    timeout: Annotated[
        str | float | None,
        Option(help="Give up a request to the endpoint after this long (default: 5m).", metavar="TIME"),
    ] = None,
    cache: Cache = None,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Let a teacher answer prompts, as training data. An endpoint's key is read from AUTODISTILL_API_KEY.

    Returns:
        Plain data: how many prompts were answered, and what became of the others.

    Raises:
        InputError: No such prompts or teacher, or arguments that contradict each other.
    """
    if endpoint is None and timeout is not None:
        raise InputError("--timeout applies to requests to an endpoint: give --endpoint, or leave it out")
    for name, value in (("teacher", teacher), ("cache", cache)) if endpoint is not None and not top_k else ():
        if value is not None:
            raise InputError(f"--{name} is not used where an endpoint writes: leave it out, or ask it for --top-k")
    seconds = 300.0 if timeout is None else parse_duration(timeout) if isinstance(timeout, str) else timeout
    from autodistill.distillation.teacher.write_data import WriteRequest, write_data
    from autodistill.inference.generation import Sampling

    request = WriteRequest(
        prompts=str(prompts),
        out=Path(out),
        teacher=DEFAULT_TEACHER if teacher is None else str(teacher),
        cache=_cache(cache),
        endpoint=endpoint,
        model=model,
        max_tokens=max_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        top_k=top_k,
        batch=batch,
        timeout=seconds,
    )
    return write_data(request, notify)


def devices(
    name: Annotated[
        str | Sequence[str] | None,
        Option(
            help="Show only devices of this name, like 4090 or apple m3.",
            metavar="NAME",
            typed=list[str],
            argument=True,
            complete="devices",
        ),
    ] = None,
    *,
    devices: Devices = None,
    local: Annotated[bool, Option(help="Include this machine; it is measured the first time.", typed=bool)] = False,
    again: Annotated[bool, Option(help="With --local: measure this machine again.", typed=bool)] = False,
    cache: Cache = None,
) -> tuple[Device, ...]:
    """List the known devices with their memory, bandwidth and computing rates.

    Raises:
        InputError: No device of this name, or a file that cannot be read.
    """
    from autodistill.hardware.local import known_devices
    from autodistill.hardware.lookup import matching

    text = name if isinstance(name, str) else " ".join(name or ())
    here = local or text.strip().lower() == LOCAL
    if again and not here:
        raise InputError("--again measures this machine again: give it with --local")
    known = known_devices([Path(file) for file in devices or ()], _cache(cache) if here else None, again=again)
    if not text:
        return known
    if text.strip().lower() == LOCAL:
        return known[:1]
    return (*known[:1], *matching(text, known[1:])) if here else matching(text, known)


def _own(files: Sequence[str | Path] | None, named: bool) -> list[Path]:
    """Files of a person's own devices, which are read where a device is asked for."""
    if files and not named:
        raise InputError("--devices only describes devices: choose one with --device")
    return [Path(file) for file in files or ()]


def _cache(folder: str | Path | None) -> Path:
    return default_cache() if folder is None else Path(folder)


def _path(file: str | Path | None) -> Path | None:
    return None if file is None else Path(file)
