"""Runs a campaign's trials in warm Ray Tune workers.

To Tune, a trial is one segment of ours: from a checkpoint, or the start, to the next rung. Pausing is then the end of a
segment and promoting the start of another, so that Tune needs no state that our own event log does not hold.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias

from autodistill.errors import LostClusterError
from autodistill.inference.torch_memory import keep_to_share
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.runners.idle_workers import Bell, Rest
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
    """Where assignments come from, and what became of them goes to: a campaign."""

    def next(self) -> Assignment | None:
        """The next piece of work, or None while there is none."""
        ...

    def take(self, assignment: Assignment, outcome: Mapping[str, Any]) -> None:
        """Takes what became of an assignment."""
        ...


def run_ray(cluster: Cluster, campaign: Campaign, setting: TrialSetting, deadline: Moment | None) -> None:
    """Drives the campaign until it is finished, and leaves the cluster.

    Args:
        cluster: Where the workers run.
        campaign: Decides what runs.
        setting: What all trials have in common.
        deadline: When a running trial is given back, or None.

    Raises:
        AutoDistillError: Ray could not be started.
        LostClusterError: It has ended.
    """
    plan = setting.plan
    process = {"CPU": float(plan.threads)} | ({"GPU": plan.gpus} if setting.device == "cuda" else {})
    # Several processes have a bundle each, near each other; the worker that holds them together needs none.
    bundles = [process] if plan.processes == 1 else [{}, *([process] * plan.processes)]
    try:
        cluster.wait()
        drive(campaign, plan.workers, bundles, partial(_worker, absolute(setting), deadline), cluster.ended)
    except _RayEnded as ended:
        raise LostClusterError(str(ended)) from None
    except Exception as error:
        # Tune wraps what its searcher raises: that nothing can be written down any more.
        raise campaign.broken or error from None
    finally:
        # On Ctrl-C the workers end here; what they trained since their last checkpoint is trained again.
        cluster.leave()


def _worker(setting: TrialSetting, deadline: Moment | None) -> Work:
    """Return what a worker process does its assignments by; made once in each."""
    if setting.plan.processes > 1:
        return Group(setting, deadline).work
    if setting.device == "cuda" and setting.plan.gpus < 1:
        keep_to_share(setting.plan.gpus)
    try:
        bench, guard = Workbench(fetch(setting)), step_guard(deadline)
    except Exception as error:
        # Told as what became of its first assignment, since of a worker that cannot begin Tune says nothing.
        failure = ("disk-full" if is_disk_full(error) else WORKER_DIED, f"its worker could not begin: {error}")
        return lambda assignment: {"failure": failure}
    return lambda assignment: attempted(bench, assignment, guard, deadline)


class _Live:
    """What holds a live view of the search. Tune keeps a pickle to restore from; ours is restored from the log."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _RayEnded(BaseException):
    """Nothing that Ray is asked comes to an end any more; no `Exception`, for which Tune would ask it to clean up."""


def drive(
    source: Source,
    workers: int,
    bundles: list[dict[str, float]],
    make: Callable[[], Work],
    ended: Callable[[], str | None],
) -> None:
    """Has warm workers do all the work that a source gives out, by Ray Tune.

    Args:
        source: Gives out assignments.
        workers: Processes at once.
        bundles: Resources of each of them, as a placement group has them.
        make: Called in each process once; gives what does an assignment there.
        ended: What of Ray itself has ended, or None.

    Raises:
        _RayEnded: As soon as any of it has.
    """
    from ray import tune
    from ray.exceptions import OutOfMemoryError
    from ray.tune import Callback

    def check() -> None:
        said = ended()
        if said is not None:
            raise _RayEnded(said)

    class Watch(_Live, Callback):  # type: ignore[misc, unused-ignore]
        """Looks after the cluster at every step of Tune."""

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            check()

    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers)
    # Tune prints the traceback of every failed trial; the campaign has recorded its cause.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable = tune.with_resources(
        tune.with_parameters(_stretch_class(), make=make), tune.PlacementGroupFactory(bundles, strategy="PACK")
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
            # Ray ended a worker for want of memory: to Tune an error of its own, with which it ends all the others.
            searcher.lose_all(str(error.__cause__))


def _fit(trainable: Any, searcher: Any, scheduler: Any, watch: Any) -> None:
    """Have Tune run all that its searcher gives out."""
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
    """Tune's own scheduler, which beside that takes note of what Ray says of a worker that ended.

    The searcher, which is asked next, is told nothing of it.
    """
    from ray.tune.schedulers import FIFOScheduler

    class Noting(_Live, FIFOScheduler):  # type: ignore[misc, unused-ignore]
        """Tune's scheduler that only keeps the error of a failed trial."""

        def on_trial_error(self, controller: Any, trial: Any) -> None:
            """Before the searcher is told that the trial has ended."""
            if trial.error_file and os.path.exists(trial.error_file):
                with open(trial.error_file, encoding="utf-8", errors="replace") as file:
                    errors[trial.trial_id] = file.read()

    return Noting()


def _searcher(source: Source, workers: int, check: Callable[[], None], errors: Mapping[str, str]) -> Any:
    """Tune's searcher: hands out the source's assignments and brings back what became of them.

    `check` raises where Ray itself has ended, with which all workers end: that is no failure of what they did. `errors`
    is what Ray says of trials whose worker ended.
    """
    from ray.tune.search import Searcher

    class CampaignSearcher(_Live, Searcher):  # type: ignore[misc, unused-ignore]
        """Gives Tune the campaign's work as if it were proposed trials."""

        def __init__(self) -> None:
            super().__init__()
            self._work: dict[str, Assignment] = {}
            self._resting: set[str] = set()
            # Processes there should be: as many as had work at once.
            self._started = 0
            self._bell = Bell()
            self._failures: dict[str, Mapping[str, Any]] = {}
            self._kills = Kills()

        def suggest(self, trial_id: str) -> Any:
            """Hands out the next assignment, rest to a worker that has none, None while there is none, or FINISHED."""
            if len(self._work) + len(self._resting) >= workers:
                return None
            assignment = source.next()
            if assignment is not None:
                self._work[trial_id] = assignment
                self._started = max(self._started, len(self._work))
                return {"assignment": _Opaque(assignment)}
            if not self._work:
                # With nothing running there is nothing that could still make work.
                return Searcher.FINISHED
            if len(self._work) + len(self._resting) >= self._started:
                return None
            self._resting.add(trial_id)
            return {"assignment": _Opaque(self._bell.rest())}

        def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
            """A segment reports at its end; if it is not done then, its worker ends, which says nothing of why."""
            if "failure" in result:
                self._failures[trial_id] = {name: result[name] for name in ("failure", "trained") if name in result}

        def on_trial_complete(
            self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
        ) -> None:
            """Takes the report, or the failure, of an assignment back."""
            if error:
                check()
            if trial_id in self._resting:
                self._resting.remove(trial_id)
                # Its process is gone, and is started again where there is work for it.
                self._started -= error
                return
            outcome: Mapping[str, Any]
            if error or result is None:
                outcome = self._failures.pop(trial_id, {}) or {"failure": self._death(trial_id)}
            else:
                outcome = result
            source.take(self._work.pop(trial_id), outcome)
            self._bell.ring()

        def lose_all(self, said: str) -> None:
            """Takes all workers as ended by what Ray says."""
            for trial_id in [*self._work]:
                source.take(self._work.pop(trial_id), {"failure": death(f"OutOfMemoryError: {said}", 0)})
            self._resting.clear()
            self._started = 0

        def _death(self, trial_id: str) -> tuple[str, str]:
            said = errors.get(trial_id, "")
            return death(said, self._kills.since(said))

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def save(self, checkpoint_path: str) -> None:
            """The campaign's own log is what a search is resumed from."""

        def restore(self, checkpoint_path: str) -> None:
            """See `save`."""

    return CampaignSearcher()


class _Opaque:
    """Keeps Tune from looking into an assignment, which it would copy, flatten and write out."""

    def __init__(self, assignment: Assignment | Rest) -> None:
        self.assignment = assignment

    def __deepcopy__(self, memo: Any) -> _Opaque:
        return self

    def __repr__(self) -> str:
        return "assignment"


def _stretch_class() -> Any:
    """Tune's trainable: one step takes one trial to one rung; the worker and its workbench stay for the next."""
    from ray import tune

    # The class goes to the workers by value, before they know where this package lies: it names nothing of it.
    class Segment(tune.Trainable):  # type: ignore[misc, unused-ignore]
        """One segment of a trial, as Tune runs it in a worker."""

        def setup(self, config: dict[str, Any], make: Callable[[], Work]) -> None:  # type: ignore[override]
            """Take the first segment's assignment and make what works on it."""
            self._assignment: Assignment | Rest = config["assignment"].assignment
            self._work = make()
            self._suspect = False
            # By now it is known where the package lies.
            from autodistill.inference.torch_memory import settle
            from autodistill.quantization.loops import loops

            # Every trial comes to need these, which are many objects: they are to settle too.
            for name in ("rounding", "k_quants"):
                loops(name)
            settle()

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            """Take the next assignment in the same process."""
            from autodistill.inference.torch_memory import give_back_memory

            self._assignment = new_config["assignment"].assignment
            give_back_memory()
            return True

        def step(self) -> dict[str, Any]:
            """Does the assignment; what goes wrong in it is a result too."""
            from autodistill.search.runners.idle_workers import Rest

            if self._suspect:
                raise RuntimeError("this process is not used again")
            if isinstance(self._assignment, Rest):
                self._assignment.wait()
                return {"done": True}
            outcome = self._work(self._assignment)
            # What another process might do better is not given to this one again: Tune drops a worker that raises.
            self._suspect = "failure" in outcome and outcome["failure"][0] in RETRIED
            return {"done": not self._suspect, **outcome}

    return Segment
