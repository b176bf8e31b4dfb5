"""Runs a campaign's trials in warm Ray Tune workers: the only file that knows Ray.

To Tune, a trial is one stretch of ours: from a checkpoint, or the start, to the next rung. Pausing is then the end of a
stretch and promoting the start of another, so that Tune needs no state that our own event log does not hold.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import torch

from autodistill.errors import AutoDistillError, TrialFailedError
from autodistill.hardware import Machine
from autodistill.search.campaign import Campaign
from autodistill.search.deadline import OutOfTime, step_guard
from autodistill.search.failures import RETRIED
from autodistill.search.trials import Assignment, work
from autodistill.trial import TrialSetting, Workbench

# Read by Ray when it is imported or started; a person's own settings go before.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Paths of a request may be relative to where it was typed.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class RayRunner:
    """A local Ray, started in the background as soon as this is made.

    Args:
        machine: Its cores and GPUs are what Ray may use.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._over = threading.Event()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._starting = threading.Thread(target=self._start, name="ray-start", daemon=True)
        self._starting.start()

    def _start(self) -> None:
        try:
            import ray

            job = ray.job_config.JobConfig()
            # Ray would put the folder where the command was typed in front of its workers' import path, where any
            # folder or file named like a library stands in for it: in a checkout, this package without its evaluators.
            job._runtime_env_has_working_dir = lambda: True  # type: ignore[method-assign, unused-ignore]
            ray.init(
                job_config=job,
                num_cpus=self._machine.cpus,
                num_gpus=len(self._machine.gpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                ignore_reinit_error=True,
            )
        except BaseException as error:
            # Raised where somebody waits for Ray, in the thread that can answer it.
            self._error = error
        self._ready.set()
        # Ray's processes end with the thread that started them, so this one stays until they are not needed.
        self._over.wait()

    def run(self, campaign: Campaign, setting: TrialSetting, deadline: float | None) -> None:
        """Drives the campaign until it is finished.

        Args:
            campaign: Decides what runs.
            setting: What all trials have in common.
            deadline: `time.time()` at which a running trial is given back, or None.

        Raises:
            AutoDistillError: Ray could not be started, or the log not be written.
        """
        self._ready.wait()
        if self._error is not None:
            raise AutoDistillError(
                f"Ray could not be started ({self._error}): try --runner inline, which needs no Ray"
            ) from self._error
        import ray

        storage = tempfile.mkdtemp(prefix="autodistill-tune-")
        try:
            _fit(campaign, setting, deadline, storage)
        except Exception as error:
            # Tune wraps what its searcher raises: that nothing can be written down any more.
            raise campaign.broken or error from None
        finally:
            # On Ctrl-C the workers end here; what they trained since their last checkpoint is trained again.
            ray.shutdown()
            self._over.set()
            shutil.rmtree(storage, ignore_errors=True)


def _fit(campaign: Campaign, setting: TrialSetting, deadline: float | None, storage: str) -> None:
    from ray import tune

    plan = setting.plan
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(plan.workers)
    # Tune prints the traceback of every failed trial; the campaign has recorded its cause.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    resources = {"cpu": float(plan.threads), "gpu": 1.0 if setting.device == "cuda" else 0.0}
    trainable = tune.with_resources(
        tune.with_parameters(_stretch_class(), setting=setting, deadline=deadline), resources
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_searcher(campaign, plan.workers), num_samples=-1, reuse_actors=True, trial_name_creator=_name
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=storage,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            # A stretch writes its own checkpoint, which a later one finds by the name of the trial.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
        ),
    )
    # For the same reason its table of failed trials goes nowhere.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        tuner.fit()


def _name(trial: Any) -> str:
    return f"stretch_{trial.trial_id}"


def _searcher(campaign: Campaign, workers: int) -> Any:
    """Tune's searcher: hands out the campaign's assignments and brings back its reports."""
    from ray.tune.search import Searcher

    class CampaignSearcher(Searcher):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self._work: dict[str, Assignment] = {}
            self._failures: dict[str, tuple[str, str]] = {}

        def suggest(self, trial_id: str) -> Any:
            """Hands out the next assignment, None while there is none, or FINISHED."""
            if len(self._work) >= workers:
                return None
            assignment = campaign.next()
            if assignment is None:
                # With nothing running there is nothing that could still make work.
                return None if self._work else Searcher.FINISHED
            self._work[trial_id] = assignment
            return {"assignment": _Opaque(assignment)}

        def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
            """A stretch reports at its end; if it is not done then, its worker ends, which says nothing of why."""
            if "failure" in result:
                self._failures[trial_id] = result["failure"]

        def on_trial_complete(
            self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
        ) -> None:
            """Takes the report, or the failure, of an assignment back."""
            assignment = self._work.pop(trial_id)
            if error or result is None:
                died = ("worker-died", "its worker process could not start, or ended: out of memory?")
                campaign.fail(assignment, *self._failures.pop(trial_id, died))
            elif "failure" in result:
                campaign.fail(assignment, *result["failure"])
            elif "report" in result:
                campaign.report(assignment, result["report"])
            else:
                campaign.abandon(assignment)

        def __reduce__(self) -> tuple[type[object], tuple[()]]:
            # Tune keeps a pickle of its searcher to restore from. Ours holds a live view, and is restored from the log.
            return object, ()

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def save(self, checkpoint_path: str) -> None:
            """The campaign's own log is what a search is resumed from."""

        def restore(self, checkpoint_path: str) -> None:
            """See `save`."""

    return CampaignSearcher()


class _Opaque:
    """Keeps Tune from looking into an assignment, which it would copy, flatten and write out."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment

    def __deepcopy__(self, memo: Any) -> _Opaque:
        return self

    def __repr__(self) -> str:
        return self.assignment.task.id


def _stretch_class() -> Any:
    """Tune's trainable: one step takes one trial to one rung; the worker and its workbench stay for the next."""
    from ray import tune

    class Stretch(tune.Trainable):  # type: ignore[misc, unused-ignore]
        def setup(  # type: ignore[override]
            self, config: dict[str, Any], setting: TrialSetting, deadline: float | None
        ) -> None:
            self._bench = Workbench(setting)
            self._guard = step_guard(deadline)
            self._assignment: Assignment = config["assignment"].assignment
            self._suspect = False

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._assignment = new_config["assignment"].assignment
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return True

        def step(self) -> dict[str, Any]:
            """Does the assignment; what goes wrong in it is a result too."""
            if self._suspect:
                raise RuntimeError("this process is not used again")
            try:
                report = work(self._bench, self._assignment, self._guard)
            except OutOfTime:
                return {"done": True}
            except TrialFailedError as error:
                # What another process might do better is not given to this one again: Tune drops a worker that raises.
                self._suspect = error.cause in RETRIED
                return {"done": not self._suspect, "failure": (error.cause, str(error))}
            return {"done": True, "report": report}

    return Stretch
