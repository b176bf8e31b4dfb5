"""The phases of a search in order, from the request to the exported student."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from autodistill.errors import AutoDistillError, InterruptedSearchError, LostClusterError, NothingFitsError
from autodistill.inference.torch_memory import give_back_memory
from autodistill.runs.checkpoints import default_limit
from autodistill.runs.events import RunEvent, SessionBegan
from autodistill.runs.phase_clock import Clock
from autodistill.runs.remote_copy import keep
from autodistill.runs.report import write_report
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.row import Row
from autodistill.runs.results.table import to_parquet
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.schema import about
from autodistill.runs.sessions import SignsOfLife, by_phase, last_ended, lasted
from autodistill.runs.students import student_bytes
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.callbacks import Callback, Callbacks, Exported, SearchFinished, SearchStarted
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.observer import Observer
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.finish import Finish, finish
from autodistill.search.finish.stopped import export_so_far, write_first
from autodistill.search.planning.placement import Place
from autodistill.search.prepare import Planned, Ready, plan_run, prepare_rows, prepare_trials
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_request
from autodistill.search.result import result_document
from autodistill.search.runners.node_files import send
from autodistill.search.workplace import (
    Runner,
    disk_faults,
    going_on,
    going_on_or_again,
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
        document: The JSON document that `--json` prints.
        rows: The rows of the validation split.
        finish: The exported row, its verification and the rows of the test split.
    """

    document: Mapping[str, Any]
    rows: tuple[Row, ...]
    finish: Finish


def search(request: SearchRequest, observer: Observer | None = None, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Find, export and verify the best model that fits the budget: a trained student or an untrained model.

    Args:
        request: What is asked.
        observer: Shows the search to the user.
        callbacks: Receive trials, rungs and exports, in this process.

    Raises:
        InputError: Bad input, found before any work is spent.
        NothingFitsError: Nothing fits the budget.
        InterruptedSearchError: Ctrl-C, or SIGTERM to the command. Everything finished so far is kept, and the best of
            it is exported unless a second signal comes. The message says how to resume.
        LostClusterError: Ray itself ended. What is finished is kept, and the message says how to resume.
        AutoDistillError: The disk had no room for a file of the search itself, or failed, or the storage failed. What
            is finished is kept, and the message says how to resume.
        VerificationError: The export differs from what was evaluated.
    """
    observer, tell = observer or Observer(), Callbacks(callbacks)
    config = check_request(request)
    # The run is locked before the cluster is joined, so that no nodes are requested for a run that is in use.
    with run_folder_of(config) as run:
        try:
            with (
                disk_faults(f"{config.out} and {config.cache}", lambda: f"; {going_on_or_again(config, run)}"),
                workplace(config) as (place, joined),
                stored_run(config, run, observer) as storage,
            ):
                asked = replace(config, name=run.name)
                return _search(asked, place, joined, run, storage, observer, tell)
        except KeyboardInterrupt:
            if not run.search_file.exists():
                raise InterruptedSearchError("stopped before the first trial: nothing to resume") from None
            raise InterruptedSearchError(f"stopped; {going_on(config, run)}") from None
        except LostClusterError as error:
            raise LostClusterError(f"{error}; {going_on(config, run)}") from None
        except OSError as error:
            if config.storage is None or not run.search_file.exists():
                raise
            # While trials run, a failing storage is waited for. Before and after them, the search cannot go on.
            raise AutoDistillError(f"the storage failed ({error}); {going_on(config, run)}") from error
        finally:
            if config.stored is None:
                run.discard()


def _search(
    config: SearchConfig,
    place: Place,
    joined: Cluster | None,
    run: RunFolder,
    storage: Storage | None,
    observer: Observer,
    tell: Callbacks,
) -> Outcome:
    clock = Clock(config.started, observer.phase)
    clock.add("load", time.monotonic() - config.started)
    if config.stored is not None:
        run.check_together(len(config.stored["plan"]["rungs"]), whole=True)
    planned = plan_run(config, place, run, clock, observer)
    config = planned.config
    if storage is not None:
        keep(run.search_file, storage)
    ended = last_ended(run.events.all(), run.path, storage)
    if ended is not None:
        run.events.add(ended)
    earlier = run.events.all()
    clock.earlier = by_phase(earlier)
    # The event is written once there is a plan. It records when the session began: the time budget counts from then.
    run.events.add(SessionBegan(time=clock.started_at))
    tell(SearchStarted(run=run.path))
    stopped = False
    with SignsOfLife(run.path, storage, clock.started_at, clock.session):
        # Ray starts while the teacher's outputs are cached. Starting it earlier would disturb the measurement.
        with runner_of(config, place, joined, run, observer.line) as runner:
            ready = prepare_rows(planned, run, clock)
            try:
                ready = prepare_trials(planned, ready, run, clock, observer)
                trained = any(row.kind in DISTILLED for row in run.events.rows(split="validation"))
                if not trained and not config.students_only:
                    # From here on something that fits is on disk.
                    observer.line(write_first(_finisher(planned, ready, run, clock, observer)))
                ready = _sent(ready, run, storage, clock)
                campaign = _trials(planned, ready, runner, run, storage, clock, earlier, observer, tell)
            except KeyboardInterrupt:
                stopped = True
        # The workers have ended by now, so their cores and memory are free.
        if stopped:
            _stop(config, planned, ready, run, clock, observer)
        outcome = _end(config, planned, ready, campaign, run, storage, clock, observer)
    for container, path in outcome.finish.paths.items():
        tell(Exported(container=container, path=path, best=outcome.finish.best))
    tell(SearchFinished(run=run.path, best=outcome.finish.best, rows=outcome.rows))
    return outcome


def _sent(ready: Ready, run: RunFolder, storage: Storage | None, clock: Clock) -> Ready:
    """Send the files that trials read to the run's storage, if it has one, and return `ready` with their new places."""
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
    """Run the trials. `earlier` is the log of all earlier sessions."""
    config, question, plan = ready.config, ready.question, planned.plan
    deadline = _deadline(planned, earlier, clock, observer)
    campaign = Campaign(
        question,
        sampler=Sampler(
            config.space,
            name=config.sampler,
            seed=config.seed,
            direction=question.judge_direction,
            further=question.further,
            earlier=ready.warm.observations,
            first=ready.warm.first,
        ),
        log=run.events,
        checkpoints=run.checkpoints,
        storage=storage,
        checkpoint_limit=config.checkpoint_limit_bytes
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
    # Free the teacher's GPU memory for the trials.
    give_back_memory()

    def spent() -> dict[str, float]:
        """Return seconds by phase: the sum over workers divided by the number of workers."""
        most, now = time.monotonic() - began, campaign.worker_seconds()
        names = {"train": "train", "evaluate": "evaluate", "load": "other"}
        return {phase: min(most, (now[name] - before[name]) / plan.workers) for phase, name in names.items()}

    with clock.counting(spent):
        runner(campaign, replace(ready.setting, device=planned.loaded.workers.device), until)
    campaign.close()
    return campaign


def _stop(
    config: SearchConfig, planned: Planned, ready: Ready, run: RunFolder, clock: Clock, observer: Observer
) -> NoReturn:
    """End a search that the user stopped: export the best row so far.

    Raises:
        InterruptedSearchError: Always. It says what was exported and how to resume the search.
    """
    observer.line("stopping: the best so far is exported first; to stop at once, interrupt once more")
    said = export_so_far(_finisher(planned, ready, run, clock, observer))
    _pages(run)
    raise InterruptedSearchError(f"stopped; {said}; {going_on(config, run)}")


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
    config: SearchConfig,
    planned: Planned,
    ready: Ready,
    campaign: Campaign,
    run: RunFolder,
    storage: Storage | None,
    clock: Clock,
    observer: Observer,
) -> Outcome:
    """Export the best row, and write the results of the search to disk."""
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
    result = result_document(config, campaign, rows, finished, plan, seconds, run, loaded.notes)
    kept = {name: result[name] for name in ("notes", "saved", "runtime", "forgotten")}
    shown = {"test": [row.row_id for row in finished.test], **finished.gains.to_json()}
    write_json(run.search_file, {**ready.document, "seconds": seconds, **kept, **shown})
    if storage is not None:
        keep(run.search_file, storage)
    _pages(run)
    return Outcome(document=result, rows=tuple(rows), finish=finished)


def _pages(run: RunFolder) -> None:
    """Write the leaderboard of the validation split and the report."""
    to_parquet(run.events.rows(split="validation"), run.leaderboard_file, run.name, about(run.read_settings()))
    write_report(run)


def _deadline(planned: Planned, earlier: Sequence[RunEvent], clock: Clock, observer: Observer) -> float | None:
    """Return the value of `time.monotonic()` at which trials must end, so that export and test still fit the time."""
    box, plan = planned.document["box"], planned.plan
    if box["seconds"] is None:
        return None
    spent = lasted(earlier, box["since"])
    left = box["seconds"] - spent - plan.seconds["export"] - plan.seconds["test"]
    if left <= 0:
        after = format_duration(box["seconds"] - spent - left)
        why = f"was used up before ({format_duration(spent)})" if spent else f"does not hold export and test ({after})"
        observer.line(
            f"the time budget of {format_duration(box['seconds'])} {why}: the run ends with what it has, and more "
            "--time extends it"
        )
    return clock.started + left
