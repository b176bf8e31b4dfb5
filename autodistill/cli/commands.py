"""What each verb of the command line calls: its options become a request, and its result plain data."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodistill.cli.streams import quiet_libraries
from autodistill.cli.summary import leaderboard_of
from autodistill.cli.tables import open_view
from autodistill.errors import InputError
from autodistill.hardware.budget import (
    CONTEXT,
    NO_LIMIT,
    Budget,
    LatencyLimit,
    check_streams,
    parse_latency,
    parse_price,
)
from autodistill.runs.run_folder import RunFolder, default_cache, known_runs
from autodistill.units import parse_bytes, parse_duration

if TYPE_CHECKING:
    from autodistill.advisor.describe import Described
    from autodistill.search.request.request import SearchRequest
    from autodistill.search.search import Outcome
    from autodistill.strategy.strategy import Strategy


RUNS = Path("results/runs")
"""Where runs are, unless a person says so."""


def search_request(given: Mapping[str, Any], verb: str, command: str, started: float) -> SearchRequest:
    """The request of a command line; no model library is imported before its numbers are known to be right.

    Args:
        given: Options by name.
        verb: "search", or "distill", which needs no budget.
        command: As typed, for the record.
        started: `time.monotonic()` at which the time box began.
    """
    budget = _budget(given, verb)
    seconds = None if given["time_box"] is None else parse_duration(given["time_box"])
    limit = parse_bytes(given["cache_limit"])
    kept = None if given["checkpoint_limit"] is None else parse_bytes(given["checkpoint_limit"])
    price = None if given["price"] is None else parse_price(given["price"])
    if price is not None and not given["plan"]:
        raise InputError("--price is for what a plan would cost: give it with --plan")
    quiet_libraries(given["teacher"], given["data"], *_further(given))
    from autodistill.search.request.request import SearchRequest

    return SearchRequest(
        budget=budget,
        context_by_default=given["context"] is None,
        memory_by_default=given["budget"] is None,
        batch_by_default=given["batch"] is None,
        device_by_default=given["device"] is None,
        teacher=given["teacher"],
        data=given["data"],
        space=given.get("space"),
        baselines=tuple(given["baseline"]) if given.get("baseline") else None,
        strategy=given.get("strategy"),
        metric=given["metric"],
        tasks=tuple(given["task"]) if given["task"] else None,
        metric_command=given["metric_command"],
        metric_direction=given["metric_direction"] and given["metric_direction"].value,
        metric_seconds=parse_duration(given["metric_timeout"]) if given["metric_timeout"] else None,
        objectives=given.get("objectives"),
        device=given.get("device"),
        sampler=given.get("sampler"),
        trials=given.get("trials"),
        warm_start=given.get("warm_start"),
        tokens=given["tokens"],
        sequence_length=given["sequence_length"],
        step_tokens=given["step_tokens"],
        time_seconds=seconds,
        explore=given.get("explore"),
        confirm=given.get("confirm"),
        students_only=given.get("students_only") or None,
        seed=given["seed"],
        name=given["name"],
        out=given["out"],
        resume=given["resume"],
        runner=given["runner"],
        ray_address=given["ray_address"],
        gpus_per_trial=given["gpus_per_trial"],
        cpus_per_trial=given["cpus_per_trial"],
        storage=given["storage"],
        cache=given["cache"] or default_cache(),
        cache_limit_bytes=limit,
        checkpoint_limit_bytes=kept,
        price=price,
        command=command,
        started=started,
    )


def _further(given: Mapping[str, Any]) -> Iterator[str]:
    """What a request names beside teacher and data that may lie on a hub: tasks of lm-eval, and models that students
    may begin from.
    """
    from autodistill.evaluators.tasks.lm_eval import PREFIX
    from autodistill.strategy.space import load_space, load_strategy

    for text in (given["metric"], given.get("objectives")):
        yield from (name for name in map(str.strip, (text or "").split(",")) if name.startswith(PREFIX))
    if given.get("space") is not None:
        yield from load_space(given["space"]).models
    strategies = (given.get("strategy"), *(given.get("baseline") or ()))
    models = (load_strategy(reference).init.model for reference in strategies if reference is not None)
    yield from filter(None, models)


def _budget(given: Mapping[str, Any], verb: str) -> Budget:
    """The limits that are typed; a device gives the memory where it is not, and is this machine where one is needed."""
    context = CONTEXT if given["context"] is None else given["context"]
    batch = 1 if given["batch"] is None else given["batch"]
    # A run that goes on has its own.
    if verb == "search" and given["budget"] is None and given["device"] is None and not given["resume"]:
        raise InputError("search needs the memory that the student may take: --budget like 16GB, or --device like 4090")
    # Numbers are read before a device is looked for, since that may measure this machine.
    memory = None if given["budget"] is None else parse_bytes(given["budget"])
    limits = () if given["latency"] is None else parse_latency(given["latency"])
    _check_room(given["batch"], limits, "--batch")
    own = _own(given, given["device"] is not None)
    Budget(memory_bytes=1, context=context, batch=batch)
    if given["device"] is None and not limits:
        return Budget(memory_bytes=memory or NO_LIMIT, context=context, batch=batch)
    from autodistill.hardware.budget import DeviceBudget, memory_on
    from autodistill.hardware.device import LOCAL
    from autodistill.hardware.local import choose_device

    named = LOCAL if given["device"] is None else given["device"]
    device = choose_device(named, given["cache"] or default_cache(), own)
    return DeviceBudget(
        memory_bytes=memory_on(device, memory), context=context, batch=batch, device=device, latency=limits
    )


def _check_room(at_once: int | None, limits: Sequence[LatencyLimit], option: str) -> None:
    """Refuses fewer sequences at once, where they were typed, than a limit of latency has streams."""
    most = max((limit.streams for limit in limits), default=1)
    if at_once is not None and 1 <= at_once < most:
        raise InputError(
            f"{option} {at_once} contradicts --latency @streams={most}, which needs the memory of {most} streams: give "
            f"{option} {most} or more, or leave it out, or lower the streams"
        )


def _own(given: Mapping[str, Any], named: bool) -> Sequence[Path]:
    """Files of a person's own devices, which are read where a device is asked for."""
    if given["own"] and not named:
        raise InputError("--devices only describes devices: choose one with --device")
    return given["own"] or ()


def searched(request: SearchRequest) -> Outcome:
    """Searches, under a live view."""
    from autodistill.cli.live import SearchView
    from autodistill.search.search import search

    with open_view() as view:
        return search(request, SearchView(view))


def written(given: Mapping[str, Any]) -> dict[str, Any]:
    """Answers prompts."""
    if given["endpoint"] is None and given["timeout"] is not None:
        raise InputError("--timeout applies to requests to an endpoint: give --endpoint, or leave it out")
    for name in ("teacher", "cache") if given["endpoint"] is not None and not given["top_k"] else ():
        if given[name] is not None:
            raise InputError(f"--{name} is not used where an endpoint writes: leave it out, or ask it for --top-k")
    timeout = parse_duration(given["timeout"] or "5m")
    quiet_libraries(given["teacher"])
    from autodistill.distillation.teacher.write_data import WriteRequest, write_data
    from autodistill.inference.generation import Sampling
    from autodistill.search.request.request import DEFAULT_TEACHER

    names = ("prompts", "out", "endpoint", "model", "max_tokens", "top_k", "batch")
    request = WriteRequest(
        **{name: given[name] for name in names},
        teacher=DEFAULT_TEACHER if given["teacher"] is None else given["teacher"],
        cache=given["cache"] or default_cache(),
        sampling=Sampling(temperature=given["temperature"], top_p=given["top_p"], seed=given["seed"]),
        timeout=timeout,
    )

    with open_view() as view:
        return write_data(request, view.log)


def listed_devices(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """The known devices, or those of a name; this machine where it is asked for."""
    from autodistill.hardware.device import LOCAL
    from autodistill.hardware.local import known_devices
    from autodistill.hardware.lookup import matching

    text = " ".join(given["name"] or ())
    local = given["local"] or text.strip().lower() == LOCAL
    if given["again"] and not local:
        raise InputError("--again measures this machine again: give it with --local")
    cache = (given["cache"] or default_cache()) if local else None
    known = known_devices(given["own"] or (), cache, again=given["again"])
    if not text:
        return known
    if text.strip().lower() == LOCAL:
        return known[:1]
    return (*known[:1], *matching(text, known[1:])) if local else matching(text, known)


def packaged(what: str, name: str | None) -> dict[str, Any]:
    """The packaged spaces or strategies with what each is, or the text of one.

    Args:
        what: "spaces" or "strategies".
        name: Of one; all are listed without it.
    """
    from autodistill.strategy.space import packaged_file, packaged_files

    if name is not None:
        path = packaged_file(what, name)
        return {"name": name, "path": str(path), "yaml": path.read_text(encoding="utf-8")}
    return {"known": {name: _about(path.read_text(encoding="utf-8")) for name, path in packaged_files(what).items()}}


def _about(text: str) -> str:
    """What a YAML file says it is: its description, or the comment that it begins with."""
    described = next((line for line in text.splitlines() if line.startswith("description: ")), None)
    if described is not None:
        return described.removeprefix("description: ").strip("\"'")
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


_SIZES = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "experts", "active_experts", "window")


def appraised(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a model, or the student that a strategy makes of it, takes and how fast it would be."""
    from autodistill.strategy.space import load_strategy

    strategy = None if given["strategy"] is None else load_strategy(given["strategy"])
    quiet_libraries(given["model"], *(() if strategy is None else filter(None, [strategy.init.model])))
    from autodistill.advisor.candidates import recalibrated
    from autodistill.advisor.describe import deployment_named, describe, shape
    from autodistill.advisor.estimate import appraise
    from autodistill.hardware.local import choose_device, known_devices

    sizes = {name: given[name] for name in _SIZES}
    if (given["model"] is None) == all(size is None for size in sizes.values()):
        raise InputError("estimate takes either a MODEL or a shape, like --layers 22 --width 2048 --heads 32 ...")
    if given["tied"] and given["model"] is not None:
        raise InputError("--tied applies to a shape given in numbers; a MODEL says itself whether its head is tied")
    if given["device"] is not None and given["all_devices"]:
        raise InputError("--device names one device and --all-devices all of them: give one of the two")
    asked = given["device"] is not None or given["all_devices"]
    if given["prompt"] is not None and not asked:
        raise InputError(
            "--prompt sets the time to the first token, which depends on the device: name one with --device"
        )
    batch = 1 if given["batch"] is None else check_streams(given["batch"], "--batch")
    own, cache = _own(given, asked), given["cache"] or default_cache()
    found = known_devices(own) if given["all_devices"] else ()
    if given["device"] is not None:
        found = (choose_device(given["device"], cache, own),)
    described = shape(sizes, tied=given["tied"]) if given["model"] is None else describe(given["model"])
    options: dict[str, Any] = {"batch": batch} | {
        name: given[name] for name in ("context", "kv_type", "runtime", "prompt")
    }
    options |= {"devices": found, "overheads": recalibrated(given["out"])}
    if strategy is not None:
        return _student_appraised(given, described, strategy, options)
    if given["format_name"]:
        described = replace(described, weights_bytes=None)
    deployment = deployment_named(given["format_name"] or described.format_name or "gguf-q8_0")
    return appraise(described, deployment, training=given["training"], **options)


def _student_appraised(
    given: Mapping[str, Any], teacher: Described, strategy: Strategy, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What the student that a strategy makes takes, served on its own grid or a named one, and trained."""
    from autodistill.advisor.describe import deployment_named
    from autodistill.advisor.estimate import TOKENS, appraise, strategy_training, student_of
    from autodistill.distillation.student.check import own_deployment

    student = student_of(teacher, strategy, given["strategy"])
    named = None if given["format_name"] is None else deployment_named(given["format_name"])
    deployment = named or own_deployment(strategy) or deployment_named("gguf-q8_0")
    tokens = TOKENS if given["training"] is None else given["training"]
    training = strategy_training(teacher, student, strategy, tokens=tokens)
    return appraise(student, deployment, **options) | {"training": training}


def picked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The best stored student for the hardware that is named."""
    from autodistill.advisor.candidates import recalibrated_by, stored
    from autodistill.advisor.measurements import read_measured
    from autodistill.advisor.pick import TIERS, pick, pick_tiers, tier_of
    from autodistill.advisor.requirements import Wanted
    from autodistill.hardware.budget import memory_on
    from autodistill.hardware.catalog import listed
    from autodistill.hardware.device import LOCAL
    from autodistill.hardware.local import choose_device

    named = given["device"]
    if given["tiers"] == (given["budget"] is not None or named is not None):
        raise InputError("pick takes --budget or --device (both: the budget on that device), or else --tiers")
    if given["tiers"] and given["latency"] is not None:
        raise InputError(
            "--tiers compares memory alone, and latency depends on the device: give --latency with a --device, or "
            "leave it out"
        )
    # Numbers are read before a device is looked for, since that may measure this machine.
    memory = None if given["budget"] is None else parse_bytes(given["budget"])
    streams = 1 if given["streams"] is None else check_streams(given["streams"], "--streams")
    limits = () if given["latency"] is None else parse_latency(given["latency"], streams)
    _check_room(given["streams"], limits, "--streams")
    own, cache = _own(given, named is not None), given["cache"] or default_cache()
    if named is None and limits:
        named = LOCAL
    found = None if named is None else choose_device(named, cache, own)
    asked = Wanted(
        # With tiers each of them is the memory.
        memory_bytes=memory_on(found, memory) if found else memory or 1,
        context=given["context"],
        streams=streams,
        device=found,
        latency=limits,
        least=given["min_accuracy"],
    )
    with _no_collection():
        rows = stored(given["out"], given["runs"] or ())
        timed = tuple(read_measured(given["out"])) if found else ()
        wanted = replace(asked, overheads=recalibrated_by(rows), measured=timed)
        if given["tiers"]:
            return pick_tiers(rows, wanted, [tier_of(size, listed()) for size in TIERS])
        answer = pick(rows, wanted)
    return answer | {"next": _to_get(answer["pick"], given["out"])}


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


def measured(given: Mapping[str, Any]) -> dict[str, Any]:
    """A student timed, or the script that times it."""
    words = [word.strip() for word in given["streams"].split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 20 for word in words):
        raise InputError(f"--streams {given['streams']!r} must be numbers separated by commas, like 1,4,16")
    timeout = None if given["timeout"] is None else parse_duration(given["timeout"])
    quiet_libraries(str(given["student"]))
    from autodistill.advisor.measure import MeasureRequest, measure

    names = ("student", "out", "on", "script", "result", "bench", "device", "ssh_config", "context", "prompt")
    request = MeasureRequest(
        **{name: given[name] for name in (*names, "decoded", "rounds", "threads", "busy")},
        own=given["own"] or (),
        streams=tuple(map(int, words)),
        cache=given["cache"] or default_cache(),
        timeout=timeout,
    )
    return measure(request)


def planned(request: SearchRequest) -> dict[str, Any]:
    """What a search would do."""
    from autodistill.cli.live import SearchView
    from autodistill.search.search import plan_search

    with open_view() as view:
        return plan_search(request, SearchView(view))


Boards = list[tuple[RunFolder, tuple[Any, str]]]


def leaderboards(runs: Sequence[str] | None, out: Path) -> Boards:
    """Runs, each with its ranked rows and their metric."""
    names = list(dict.fromkeys(runs or known_runs(out)))
    if not names:
        raise InputError(f"there are no runs in {out}: make one with autodistill search, or name another --out")
    found = [RunFolder.open(out, name) for name in names]
    return [(run, leaderboard_of(run)) for run in found]


def explained(run: RunFolder) -> dict[str, Any]:
    """What a run has shown, with its lines for a person under "text"."""
    from autodistill.search.explain import explain

    found = explain(run)
    return {**found.to_json(), "text": found.describe()}


def exported(run: RunFolder, row: str | None, containers: Sequence[str], out: Path) -> dict[str, str]:
    """Paths of a student's containers, by name."""
    quiet_libraries()
    from autodistill.search.finish.export_run import export_run

    with open_view() as view:
        return {name: str(path) for name, path in export_run(run, row, containers, out, view.log).items()}
