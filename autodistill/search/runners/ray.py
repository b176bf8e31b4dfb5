"""Run a campaign's trials in warm Ray Tune workers.

For Tune, a trial is one segment of our trial: from a checkpoint, or the start, to the next rung. So pausing is the end
of a segment, and promoting is the start of another. Tune then needs no state that our own event log does not have.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol, TypeAlias

from autodistill.errors import LostClusterError
from autodistill.inference.torch_memory import keep_to_share
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.runners.idle_workers import Bell, IdleWait
from autodistill.search.runners.node_files import absolute, fetch
from autodistill.search.runners.oom_kills import Kills
from autodistill.search.runners.process_group import Group
from autodistill.search.runners.ray_session import Cluster
from autodistill.search.worker.attempt import Assignment, attempted, step_guard
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.failures import RETRIED, WORKER_DIED, death, is_disk_full
from autodistill.search.worker.messages import TrialSetting
from autodistill.utils.clock import Moment

Work: TypeAlias = Callable[[Assignment], dict[str, Any]]


class Source(Protocol):
    """Where assignments come from and their outcomes go: a campaign."""

    def next(self) -> Assignment | None:
        """Return the next piece of work, or None if there is none at the moment."""
        ...

    def take(self, assignment: Assignment, outcome: Mapping[str, Any]) -> None:
        """Take the outcome of an assignment."""
        ...


def run_ray(cluster: Cluster, campaign: Campaign, setting: TrialSetting, deadline: Moment | None) -> None:
    """Drive the campaign until it is finished, and leave the cluster.

    Args:
        cluster: Where the workers run.
        campaign: Decides what runs.
        setting: What all trials have in common.
        deadline: When a running trial is given back, or None.

    Raises:
        AutoDistillError: Ray could not be started.
        LostClusterError: The cluster has ended.
    """
    plan = setting.plan
    process = {"CPU": float(plan.threads)} | ({"GPU": plan.gpus} if setting.device == "cuda" else {})
    # Each of several processes has its own bundle, and the bundles are close together. The worker that manages the
    # processes needs no resources.
    bundles = [process] if plan.processes == 1 else [{}, *([process] * plan.processes)]
    try:
        cluster.wait()
        drive(campaign, plan.workers, bundles, partial(_worker, absolute(setting), deadline), cluster.ended)
    except _RayEnded as ended:
        raise LostClusterError(str(ended)) from None
    except Exception as error:
        # Tune wraps what its searcher raises, such as that the log cannot be written any more.
        raise campaign.broken or error from None
    finally:
        # On Ctrl-C the workers end here. What they trained since their last checkpoint is trained again.
        cluster.leave()


def _worker(setting: TrialSetting, deadline: Moment | None) -> Work:
    """Return the function with which a worker process does its assignments. Each process makes it once."""
    if setting.plan.processes > 1:
        return Group(setting, deadline).work
    if setting.device == "cuda" and setting.plan.gpus < 1:
        keep_to_share(setting.plan.gpus)
    try:
        bench, guard = Workbench(fetch(setting)), step_guard(deadline)
    except Exception as error:
        # Reported as the outcome of its first assignment, because Tune says nothing about a worker that cannot begin.
        failure = ("disk-full" if is_disk_full(error) else WORKER_DIED, f"its worker could not begin: {error}")
        return lambda assignment: {"failure": failure}
    return lambda assignment: attempted(bench, assignment, guard, deadline)


class _Live:
    """Base of objects with a live view of the search.

    Tune pickles such objects to restore from. Ours are restored from the log instead.
    """

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _RayEnded(BaseException):
    """Ray has ended, so calls to it never return.

    This is no `Exception`, because Tune would then ask Ray to clean up.
    """


def drive(
    source: Source,
    workers: int,
    bundles: list[dict[str, float]],
    make: Callable[[], Work],
    ended: Callable[[], str | None],
) -> None:
    """Let warm workers do all the work that a source gives out, with Ray Tune.

    Args:
        source: Gives out assignments.
        workers: Number of processes at the same time.
        bundles: Resources of each process, as in a placement group.
        make: Called once in each process; returns the function that does an assignment there.
        ended: Returns which part of Ray has ended, or None.

    Raises:
        _RayEnded: A part of Ray has ended.
    """
    from ray import tune
    from ray.exceptions import OutOfMemoryError
    from ray.tune import Callback

    def check() -> None:
        said = ended()
        if said is not None:
            raise _RayEnded(said)

    class Watch(_Live, Callback):  # type: ignore[misc, unused-ignore]
        """Checks the cluster at every step of Tune."""

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            check()

    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers)
    # Tune prints the traceback of every failed trial; the campaign has recorded its cause.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable = tune.with_resources(
        tune.with_parameters(_segment_class(), make=make), tune.PlacementGroupFactory(bundles, strategy="PACK")
    )
    errors: dict[str, str] = {}
    searcher = _searcher(source, workers, check, errors)
    while True:
        try:
            _fit(trainable, searcher, _scheduler(errors), Watch())
            return
        except RuntimeError as error:
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            # Ray ended a worker for lack of memory. For Tune that is an error of its own, and it ends all other workers
            # too.
            searcher.lose_all(str(error.__cause__))


def _fit(trainable: Any, searcher: Any, scheduler: Any, watch: Any) -> None:
    """Let Tune run everything that its searcher gives out."""
    from ray import tune

    storage = tempfile.mkdtemp(prefix="autodistill-tune-")
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=True, trial_name_creator=_name
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=storage,
            verbose=0,
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=0),
            # A segment writes its own checkpoint, which a later one finds by the name of the trial.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
        ),
    )
    try:
        # Its table of failed trials goes nowhere: the campaign has recorded their causes.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            tuner.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _name(trial: Any) -> str:
    return f"stretch_{trial.trial_id}"


def _scheduler(errors: dict[str, str]) -> Any:
    """Return Tune's own scheduler, which also records Ray's message about a worker that ended.

    Tune does not pass this message to the searcher, which it asks next.
    """
    from ray.tune.schedulers import FIFOScheduler

    class Noting(_Live, FIFOScheduler):  # type: ignore[misc, unused-ignore]
        """Tune's scheduler, which also keeps the error of a failed trial."""

        def on_trial_error(self, controller: Any, trial: Any) -> None:
            """Keep the error before the searcher learns that the trial has ended."""
            if trial.error_file and os.path.exists(trial.error_file):
                with open(trial.error_file, encoding="utf-8", errors="replace") as file:
                    errors[trial.trial_id] = file.read()

    return Noting()


class _CampaignSearcher(_Live):
    """Gives Tune the campaign's work as if it were proposed trials. See `_searcher` for the arguments.

    It is completed by Tune's `Searcher`, which is imported only where Ray is used.
    """

    FINISHED: ClassVar[str]

    def __init__(self, source: Source, workers: int, check: Callable[[], None], errors: Mapping[str, str]) -> None:
        super().__init__()
        self._source, self._workers, self._check, self._errors = source, workers, check, errors
        self._work: dict[str, Assignment] = {}
        self._resting: set[str] = set()
        # Number of processes that should exist: as many as had work at the same time.
        self._started = 0
        self._bell = Bell()
        self._failures: dict[str, Mapping[str, Any]] = {}
        self._kills = Kills()

    def suggest(self, trial_id: str) -> Any:
        """Return the next assignment, a rest for a worker without one, None if there is none yet, or FINISHED."""
        if len(self._work) + len(self._resting) >= self._workers:
            return None
        assignment = self._source.next()
        if assignment is not None:
            self._work[trial_id] = assignment
            self._started = max(self._started, len(self._work))
            return {"assignment": _Opaque(assignment)}
        if not self._work:
            # While nothing runs, nothing can create new work.
            return self.FINISHED
        if len(self._work) + len(self._resting) >= self._started:
            return None
        self._resting.add(trial_id)
        return {"assignment": _Opaque(self._bell.rest())}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keep the failure that a segment reports.

        If the segment is not done then, its worker ends, and Tune reports no reason for that.
        """
        if "failure" in result:
            self._failures[trial_id] = {name: result[name] for name in ("failure", "trained") if name in result}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Pass the report or the failure of an assignment to the source."""
        if error:
            self._check()
        if trial_id in self._resting:
            self._resting.remove(trial_id)
            # Its process has ended, and is started again when there is work for it.
            self._started -= error
            return
        outcome: Mapping[str, Any]
        if error or result is None:
            outcome = self._failures.pop(trial_id, {}) or {"failure": self._death(trial_id)}
        else:
            outcome = result
        self._source.take(self._work.pop(trial_id), outcome)
        self._bell.ring()

    def lose_all(self, message: str) -> None:
        """Treat all workers as ended for the reason that Ray gives."""
        for trial_id in [*self._work]:
            self._source.take(self._work.pop(trial_id), {"failure": death(f"OutOfMemoryError: {message}", 0)})
        self._resting.clear()
        self._started = 0

    def _death(self, trial_id: str) -> tuple[str, str]:
        said = self._errors.get(trial_id, "")
        return death(said, self._kills.since(said))

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a search resumes from the campaign's own log."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, as `save`."""


def _searcher(source: Source, workers: int, check: Callable[[], None], errors: Mapping[str, str]) -> Any:
    """Return Tune's searcher, which gives out the source's assignments and brings back their outcomes.

    Args:
        source: Gives out assignments.
        workers: Number of processes at the same time.
        check: Raises if Ray itself has ended. All workers end with it, so that is no failure of their work.
        errors: Ray's messages about trials whose worker ended.
    """
    from ray.tune.search import Searcher

    class CampaignSearcher(_CampaignSearcher, Searcher):  # type: ignore[misc, unused-ignore]
        """The searcher as Tune expects it."""

    return CampaignSearcher(source, workers, check, errors)


class _Opaque:
    """Hides an assignment from Tune, which would copy it, flatten it and write it out."""

    def __init__(self, assignment: Assignment | IdleWait) -> None:
        self.assignment = assignment

    def __deepcopy__(self, memo: Any) -> _Opaque:
        return self

    def __repr__(self) -> str:
        return "assignment"


def _segment_class() -> Any:
    """Return Tune's trainable. One step takes one trial to one rung; the worker and its workbench stay for the next."""
    from ray import tune

    # The class goes to the workers by value, before they know where this package is. So it names nothing from it.
    class Segment(tune.Trainable):  # type: ignore[misc, unused-ignore]
        """One segment of a trial, as Tune runs it in a worker."""

        def setup(self, config: dict[str, Any], make: Callable[[], Work]) -> None:  # type: ignore[override]
            """Take the first segment's assignment, and make the function that works on it."""
            self._assignment: Assignment | IdleWait = config["assignment"].assignment
            self._work = make()
            self._suspect = False
            # By now the package can be found.
            from autodistill.inference.torch_memory import freeze_garbage_collection
            from autodistill.quantization.loops import loops

            # Every trial will need these, and they are many objects, so they are loaded before the freeze.
            for name in ("rounding", "k_quants"):
                loops(name)
            freeze_garbage_collection()

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            """Take the next assignment in the same process."""
            from autodistill.inference.torch_memory import give_back_memory

            self._assignment = new_config["assignment"].assignment
            give_back_memory()
            return True

        def step(self) -> dict[str, Any]:
            """Do the assignment. A failure of it is a result too."""
            from autodistill.search.runners.idle_workers import IdleWait

            if self._suspect:
                raise RuntimeError("this process is not used again")
            if isinstance(self._assignment, IdleWait):
                self._assignment.wait()
                return {"done": True}
            outcome = self._work(self._assignment)
            # Work that another process might do better does not go to this one again: Tune drops a worker that raises.
            self._suspect = "failure" in outcome and outcome["failure"][0] in RETRIED
            return {"done": not self._suspect, **outcome}

    return Segment
