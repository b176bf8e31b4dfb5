"""The search from request to exported student: the one function that puts all rooms in order."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from autodistill.distillation.training.plan import Plan
from autodistill.errors import AutoDistillError, InputError, InterruptedSearchError, LostClusterError, NothingFitsError
from autodistill.hardware.budget import Price
from autodistill.inference.torch_memory import give_back_memory
from autodistill.runs.checkpoints import default_limit
from autodistill.runs.events import RunEvent, SessionBegan
from autodistill.runs.phase_clock import Clock
from autodistill.runs.remote_copy import keep
from autodistill.runs.report import write_report
from autodistill.runs.results.differences import differences
from autodistill.runs.results.gains import named
from autodistill.runs.results.leaderboard import DISTILLED, rank
from autodistill.runs.results.objectives import front
from autodistill.runs.results.row import Row, Status, to_parquet
from autodistill.runs.results.selection import contenders
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.savings import saved
from autodistill.runs.schema import about
from autodistill.runs.sessions import SignsOfLife, by_phase, last_ended, lasted
from autodistill.runs.students import student_bytes
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.callbacks import Callback, Callbacks, Exported, SearchFinished, SearchStarted
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.observer import Observer
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.finish import Finish, finish
from autodistill.search.finish.stopped import export_so_far
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Place
from autodistill.search.planning.plan import cost, students_disk
from autodistill.search.prepare import Planned, Ready, plan_run, prepare_rows, prepare_trials
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_request
from autodistill.search.runners.node_files import send
from autodistill.search.setup.loading import Loaded, load
from autodistill.search.setup.measure_plan import plan_from_measurement
from autodistill.search.setup.solve_phase import construct
from autodistill.search.setup.teacher_phase import cache_settings, calibration_file, check_cache_limit
from autodistill.search.shortfall import shortfall
from autodistill.search.workplace import (
    Runner,
    disk_faults,
    going_on,
    going_on_or_again,
    resuming,
    run_folder_of,
    runner_of,
    stored_run,
    workplace,
)
from autodistill.units import format_duration
from autodistill.utils.clock import Moment
from autodistill.utils.json_files import write_json
from autodistill.utils.storage import Storage

if TYPE_CHECKING:
    from autodistill.search.runners.ray_session import Cluster


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found.

    Attributes:
        document: The one JSON document of `--json`.
        rows: Of the validation split.
        finish: What is exported, its verification and the test split.
    """

    document: Mapping[str, Any]
    rows: tuple[Row, ...]
    finish: Finish


def plan_search(request: SearchRequest, observer: Observer | None = None, price: Price | None = None) -> dict[str, Any]:
    """What a search would do, as plain data; nothing but the shared cache of teacher and data is written.

    Raises:
        InputError: Bad input; or a run that goes on, which has its plan.
    """
    if request.resume:
        raise InputError(
            "--plan shows what a new search would do, and a run that goes on keeps the plan in its search.json: leave "
            "out --plan or --resume"
        )
    check_shows_nothing(request)
    checked = check_request(request)
    with disk_faults(str(checked.cache), lambda: ""), workplace(checked) as (place, _):
        told = observer or Observer()
        return _plan(checked, place, told, price)


def check_shows_nothing(request: SearchRequest) -> None:
    """Refuse to show a search that is only planned.

    Raises:
        InputError: It was asked for.
    """
    for option, shown in (("--metrics-port", request.metrics_port is not None), ("--dashboard", request.dashboard)):
        if shown:
            raise InputError(f"--plan trains nothing that could be watched: leave out --plan or {option}")


def _plan(checked: SearchConfig, place: Place, observer: Observer, price: Price | None) -> dict[str, Any]:
    observer.phase("loading teacher and data")
    loaded = load(checked, place)
    check_cache_limit(checked, loaded)
    if checked.declared.solved:
        observer.phase("solving what fits")
        checked = construct(checked, loaded, observer.line)
    observer.phase("measuring this machine")
    plan, speed = plan_from_measurement(checked, loaded, time.monotonic() - checked.started)
    return plan_document(checked, loaded.stepping(plan.batch_tokens), plan, speed, place, price)


def plan_document(
    checked: SearchConfig, loaded: Loaded, plan: Plan, speed: Speed, place: Place, price: Price | None
) -> dict[str, Any]:
    """What a planned search would do, as plain data.

    Args:
        checked: What is asked, with what was solved.
        loaded: Teacher and data, with the plan's optimiser steps.
        plan: Of the search.
        speed: That it was made for.
        place: Where it would run.
        price: Of an hour; None where no cost is asked for.
    """
    settings = cache_settings(checked.space, loaded.spec, plan.bf16, calibration_file(checked, loaded))
    tokens = min(plan.most_tokens, loaded.data.splits["train"].sequences * plan.sequence_length)
    per_token = settings.bytes_per_token(loaded.spec.vocabulary, loaded.spec.width)
    return {
        "plan": plan.to_json(),
        "speed": asdict(speed),
        "cache_bytes": tokens * per_token,
        **students_disk(
            plan,
            loaded.most_parameters,
            baselines=len(checked.space.baselines),
            confirm=checked.confirm,
        ),
        "training_bytes": {**loaded.fit.estimate.parts, "total_bytes": loaded.fit.estimate.total_bytes},
        "evaluation_bytes": loaded.fit.evaluation_bytes,
        "budget": checked.budget.to_json(),
        "baselines": list(checked.space.baselines),
        "constructions": [one.to_json() for one in checked.constructions],
        "fits": [one.describe() for one in checked.constructions],
        "notes": list(loaded.notes),
        "expected_seconds": sum(plan.seconds.values()),
        **cost(plan, place.machines, price),
    }


def search(request: SearchRequest, observer: Observer | None = None, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Finds, exports and verifies the best that fits the budget: a student, or what needs no training.

    Args:
        request: What is asked.
        observer: Shows the search to a person.
        callbacks: Are told of trials, rungs and exports, in this process.

    Raises:
        InputError: Bad input, before any work is spent.
        NothingFitsError: Nothing fits the budget.
        InterruptedSearchError: Ctrl-C, or SIGTERM to the command; everything finished so far is kept, the best of it is
            exported unless a second one comes, and the message says how to resume.
        LostClusterError: Ray itself ended; likewise.
        AutoDistillError: There was no room for a file of the search itself; likewise.
        VerificationError: What was exported is not what was evaluated.
    """
    observer, tell = observer or Observer(), Callbacks(callbacks)
    checked = check_request(request)
    # Locked before a cluster is joined, whose nodes nobody asks for a run that another process goes on with.
    with run_folder_of(checked) as run:
        try:
            with (
                disk_faults(f"{checked.out} and {checked.cache}", lambda: f"; {going_on_or_again(checked, run)}"),
                workplace(checked) as (place, joined),
                stored_run(checked, run, observer) as storage,
            ):
                asked = replace(checked, name=run.name)
                return _search(asked, place, joined, run, storage, observer, tell)
        except KeyboardInterrupt:
            if not run.search_file.exists():
                raise InterruptedSearchError("stopped before the first trial: nothing to resume") from None
            raise InterruptedSearchError(f"stopped; {going_on(checked, run)}") from None
        except LostClusterError as error:
            raise LostClusterError(f"{error}; {going_on(checked, run)}") from None
        except OSError as error:
            if checked.storage is None or not run.search_file.exists():
                raise
            # One that fails while trials run is waited for; before and after them nothing goes on without it.
            raise AutoDistillError(f"the storage failed ({error}); {going_on(checked, run)}") from error
        finally:
            if checked.stored is None:
                run.discard()


def _search(
    checked: SearchConfig,
    place: Place,
    joined: Cluster | None,
    run: RunFolder,
    storage: Storage | None,
    observer: Observer,
    tell: Callbacks,
) -> Outcome:
    clock = Clock(checked.started, observer.phase)
    clock.add("load", time.monotonic() - checked.started)
    if checked.stored is not None:
        run.check_together(len(checked.stored["plan"]["rungs"]), whole=True)
    planned = plan_run(checked, place, run, clock, observer)
    checked = planned.config
    if storage is not None:
        keep(run.search_file, storage)
    ended = last_ended(run.events.all(), run.path, storage)
    if ended is not None:
        run.events.add(ended)
    earlier = run.events.all()
    clock.earlier = by_phase(earlier)
    # Written down once there is a plan, it says when the session began, from where the time budget counts.
    run.events.add(SessionBegan(time=clock.started_at))
    tell(SearchStarted(run=run.path))
    stopped = False
    with SignsOfLife(run.path, storage, clock.started_at, clock.session):
        # Ray starts while the teacher's outputs are cached: not before, since it would disturb the measurement.
        with runner_of(checked, place, joined, run, observer.line) as runner:
            ready = prepare_rows(planned, run, clock)
            try:
                ready = prepare_trials(planned, ready, run, clock, observer)
                ready = _sent(ready, run, storage, clock)
                campaign = _trials(planned, ready, runner, run, storage, clock, earlier, observer, tell)
            except KeyboardInterrupt:
                stopped = True
        # Once the workers have left their cores and memory.
        if stopped:
            _stop(checked, planned, ready, run, clock, observer)
        outcome = _end(checked, planned, ready, campaign, run, storage, clock, observer)
    for container, path in outcome.finish.paths.items():
        tell(Exported(container=container, path=path, best=outcome.finish.best))
    tell(SearchFinished(run=run.path, best=outcome.finish.best, rows=outcome.rows))
    return outcome


def _sent(ready: Ready, run: RunFolder, storage: Storage | None, clock: Clock) -> Ready:
    """The same with what trials read on the run's storage, where it has one."""
    if storage is None:
        return ready
    with clock.phase("load", "sending what trials read"):
        keep(run.search_file, storage)
        return replace(ready, setting=send(ready.setting, storage, ready.config.cache_limit_bytes))


def _trials(
    planned: Planned,
    ready: Ready,
    runner: Runner,
    run: RunFolder,
    storage: Storage | None,
    clock: Clock,
    earlier: Sequence[RunEvent],
    observer: Observer,
    tell: Callbacks,
) -> Campaign:
    """Run the trials; `earlier` is the log of the sessions before this one."""
    checked, question, plan = ready.config, ready.question, planned.plan
    deadline = _deadline(planned, earlier, clock, observer)
    campaign = Campaign(
        question,
        sampler=Sampler(
            checked.space,
            name=checked.sampler,
            seed=checked.seed,
            direction=question.judge_direction,
            further=question.further,
            earlier=ready.warm.observations,
            first=ready.warm.first,
        ),
        log=run.events,
        checkpoints=run.checkpoints,
        storage=storage,
        checkpoint_limit=checked.checkpoint_limit_bytes
        or default_limit(run.checkpoints, storage, sum(student_bytes(run.checkpoints, storage).values())),
        deadline=deadline,
        notify=observer.line,
        tell=tell,
    )
    campaign.replay(earlier)
    campaign.watch = lambda: observer.campaign(campaign, *campaign.standing())
    began = time.monotonic()
    observer.phase("trials")
    before = campaign.worker_seconds()
    until = None if deadline is None else Moment(deadline + 15)
    # What the teacher took of a GPU, its trials take now.
    give_back_memory()

    def spent() -> dict[str, float]:
        """By phase, on all workers at once."""
        most, now = time.monotonic() - began, campaign.worker_seconds()
        names = {"train": "train", "evaluate": "evaluate", "load": "other"}
        return {phase: min(most, (now[name] - before[name]) / plan.workers) for phase, name in names.items()}

    with clock.counting(spent):
        runner(campaign, replace(ready.setting, device=planned.loaded.workers.device), until)
    campaign.close()
    return campaign


def _stop(
    checked: SearchConfig, planned: Planned, ready: Ready, run: RunFolder, clock: Clock, observer: Observer
) -> NoReturn:
    """End a search that a person stopped with the best that it has.

    Raises:
        InterruptedSearchError: Always, with what was exported and how the search goes on.
    """
    observer.line("stopping: the best so far is exported first; to stop at once, interrupt once more")
    said = export_so_far(_finisher(planned, ready, run, clock, observer))
    _pages(run)
    raise InterruptedSearchError(f"stopped; {said}; {going_on(checked, run)}")


def _finisher(planned: Planned, ready: Ready, run: RunFolder, clock: Clock, observer: Observer) -> Finisher:
    return Finisher(
        question=ready.question,
        setting=ready.setting,
        run=run,
        teacher=planned.loaded.teacher,
        data=planned.loaded.data,
        threads=planned.loaded.threads,
        phases=clock,
        line=observer.line,
        general=planned.config.general,
        trained_text=planned.config.source.fingerprint,
    )


def _end(
    checked: SearchConfig,
    planned: Planned,
    ready: Ready,
    campaign: Campaign,
    run: RunFolder,
    storage: Storage | None,
    clock: Clock,
    observer: Observer,
) -> Outcome:
    """Export the best of what was trained, and write down what the search found."""
    loaded, plan = planned.loaded, planned.plan
    rows = run.events.rows(split="validation")
    try:
        finished = finish(rows, _finisher(planned, ready, run, clock, observer))
    except NothingFitsError as error:
        _pages(run)
        raise NothingFitsError(
            f"{error}; what was trained, and what it needs, is in {run.path / 'report.md'}"
        ) from None
    rows = run.events.rows(split="validation")
    seconds = clock.summary()
    result = _result(checked, campaign, rows, finished, plan, seconds, run, loaded.notes)
    kept = {name: result[name] for name in ("notes", "saved", "runtime", "forgotten")}
    shown = {"test": [row.row_id for row in finished.test], **finished.gains.to_json()}
    write_json(run.search_file, {**ready.document, "seconds": seconds, **kept, **shown})
    if storage is not None:
        keep(run.search_file, storage)
    _pages(run)
    return Outcome(document=result, rows=tuple(rows), finish=finished)


def _pages(run: RunFolder) -> None:
    """Write the leaderboard of the validation split and the report."""
    to_parquet(run.events.rows(split="validation"), run.leaderboard_file, run.name, about(run.asked()))
    write_report(run)


def _deadline(planned: Planned, earlier: Sequence[RunEvent], clock: Clock, observer: Observer) -> float | None:
    """`time.monotonic()` after which no trial may run, so that export and test still fit the time that is left."""
    box, plan = planned.document["box"], planned.plan
    if box["seconds"] is None:
        return None
    spent = lasted(earlier, box["since"])
    left = box["seconds"] - spent - plan.seconds["export"] - plan.seconds["test"]
    if spent and left <= 0:
        observer.line(
            f"the time budget of {format_duration(box['seconds'])} was used up before ({format_duration(spent)}): "
            "the run ends with what it has, and more --time extends it"
        )
    return clock.started + left


def _result(
    checked: SearchConfig,
    campaign: Campaign,
    rows: list[Row],
    finished: Finish,
    plan: Plan,
    seconds: Mapping[str, float],
    run: RunFolder,
    told: Sequence[str],
) -> dict[str, Any]:
    """The search's one JSON document."""
    ranked = rank(contenders(rows), checked.metric, checked.direction)
    short = _short_of_the_end(finished.best, rows, checked, run, plan)
    alone = checked.constructions and not checked.space.baselines
    beside = ["no hand-designed recipe was trained to be beaten: --baseline hand_designed has one"] if alone else []
    notes = [*told, *plan.notes, *short, *finished.notes, *shortfall(campaign, plan), *beside]
    return {
        "name": run.name,
        "best": finished.best.to_json(),
        "rows": [one.row.to_json() for one in ranked],
        "objectives": [objective.name for objective in checked.objectives],
        "front": [row.to_json() for row in front(rows, checked.objectives)],
        "baseline": next((one.row.to_json() for one in ranked if one.row.kind == "baseline"), None),
        "teacher": [one.row.to_json() for one in ranked if one.row.kind == "teacher"],
        "rejected": _without_student(campaign, Status.REJECTED),
        "failed": _without_student(campaign, Status.FAILED),
        "test": [row.to_json() for row in finished.test],
        **finished.gains.to_json(),
        "differences_on_test": [item.to_json() for item in differences(finished.test, finished.best.row_id)],
        "forgotten": finished.forgotten and asdict(finished.forgotten),
        "confirmation": [item.to_json() for item in finished.confirmed],
        "runtime": {name: asdict(check) for name, check in finished.checks.items()},
        "budget": checked.budget.to_json(),
        "plan": plan.to_json(),
        "seconds": dict(seconds),
        "saved": saved(run.events.all(), plan).to_json(),
        "notes": notes,
        "paths": {"run": str(run.path), **{name: str(path) for name, path in finished.paths.items()}},
    }


def _without_student(campaign: Campaign, status: Status) -> list[dict[str, Any]]:
    """The trials that ended so, each with its strategy and the reason."""
    return [
        {"trial": trial.task.id, "strategy": trial.task.strategy.to_json(), "reason": trial.reason}
        for trial in campaign.trials.values()
        if trial.status is status
    ]


def _short_of_the_end(best: Row, rows: Sequence[Row], checked: SearchConfig, run: RunFolder, plan: Plan) -> list[str]:
    """That no student was trained to the end, what is exported all the same, and how it is trained on."""
    trained = [row for row in rows if row.kind in DISTILLED]
    if any(row.full for row in trained) and best.full:
        return []
    note = "no trial reached the end of the plan" if trained else "nothing was trained as far as a rung"
    if best.full:
        note += f": {named(best)} is exported"
    else:
        note += (
            f": the best student is exported as it is after {best.fidelity:.0%} of the plan's tokens "
            f"({best.train_tokens:,} of {plan.tokens:,})"
        )
    if plan.box_seconds is None and checked.time_seconds is None:
        return [note]
    again = "" if checked.time_seconds is not None else f" --time {math.ceil(plan.box_seconds or 0)}s"
    return [f"{note}; to continue for the same time again: {resuming(checked, run)}{again}"]
