"""Write trials as runs of MLflow, in an experiment with the search's name."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.trackers.base import Tracker
from autodistill.trackers.trials import Point, TrackedTrial, identity_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOCAL = "sqlite:///mlflow.db"
# Report a server that does not answer within half a minute, not after MLflow's seven tries. Send no usage statistics.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_AT_ONCE = {"metrics": 500, "params": 100}  # MLflow's limits for one request
_LONGEST = 500  # characters of a parameter or a tag
_TRIAL, _RUN = "autodistill.trial", "autodistill.run_identity"
_STATES = {None: "RUNNING", "completed": "FINISHED", "stopped": "FINISHED", "rejected": "KILLED", "failed": "FAILED"}


class MlflowTracker(Tracker):
    """Writes to a server or a database that MLflow knows by a URI.

    The default place is MLFLOW_TRACKING_URI, or `mlflow.db` in the working folder. If a trial is already there, its run
    is continued: metrics have the times of the log, so MLflow does not store any of them twice.
    """

    def __init__(self, run: RunFolder, place: str | None) -> None:
        super().__init__(run, place)
        self._uri = place or os.environ.get("MLFLOW_TRACKING_URI") or _LOCAL
        self._runs: dict[str, str] = {}
        self._experiment: str | None = None
        self._made: MlflowClient | None = None

    @classmethod
    def check(cls, place: str | None) -> None:
        """Refuse folders, since MLflow no longer writes into plain files."""
        uri = place or os.environ.get("MLFLOW_TRACKING_URI") or _LOCAL
        if "://" not in uri or uri.startswith("file:"):
            raise InputError(
                f"mlflow={uri} is a folder, and MLflow keeps runs in a database or on a server: write "
                "mlflow=sqlite:///mlflow.db, or mlflow=http://HOST:PORT"
            )

    @property
    def _client(self) -> MlflowClient:
        if self._made is None:
            for name, value in _SETTINGS.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self._made = MlflowClient(tracking_uri=self._uri)
        return self._made

    def send(self, trial: TrackedTrial, points: Sequence[Point], *, first: bool, last: bool) -> None:
        """Log parameters of a new trial, metrics by tokens, and the final figures and state of an ended trial."""
        from mlflow.entities import Metric, Param, RunTag

        name = self._runs.get(trial.trial) or self._run_of(trial)
        if first:
            params = [Param(key, str(value)[:_LONGEST]) for key, value in trial.params.items()]
            for start in range(0, len(params), _AT_ONCE["params"]):
                self._client.log_batch(name, params=params[start : start + _AT_ONCE["params"]])
        metrics = [
            Metric(key, value, _milliseconds(point.time), point.tokens)
            for point in points
            for key, value in point.values.items()
        ]
        if trial.ended is not None:
            step = trial.points[-1].tokens if trial.points else 0
            metrics += [Metric(key, value, _milliseconds(trial.ended), step) for key, value in trial.final.items()]
        for start in range(0, len(metrics), _AT_ONCE["metrics"]):
            self._client.log_batch(name, metrics=metrics[start : start + _AT_ONCE["metrics"]])
        self._client.log_batch(name, tags=[RunTag(key, value) for key, value in _tags(trial.tags).items()])
        if trial.ended is not None:
            self._client.set_terminated(name, _STATES[trial.status], _milliseconds(trial.ended))

    def _run_of(self, trial: TrackedTrial) -> str:
        """Return MLflow's run of a trial: that of an earlier session, or a new one."""
        mine = identity_of(self.run)
        experiment = self._experiment or self._named()
        asked = f"tags.`{_TRIAL}` = '{trial.trial}' AND tags.`{_RUN}` = '{mine}'"
        found = self._client.search_runs([experiment], asked, max_results=1)
        if found:
            name = str(found[0].info.run_id)
            self._client.update_run(name, status=_STATES[trial.status])
        else:
            tags = {_TRIAL: trial.trial, _RUN: mine, "autodistill.run": self.run.name}
            began = _milliseconds(trial.began)
            made = self._client.create_run(experiment, start_time=began, tags=tags, run_name=trial.title[:_LONGEST])
            name = str(made.info.run_id)
        self._runs[trial.trial] = name
        return name

    def _named(self) -> str:
        found: Any = self._client.get_experiment_by_name(self.run.name)
        self._experiment = str(found.experiment_id) if found else str(self._client.create_experiment(self.run.name))
        return self._experiment

    def close(self) -> None:
        """Do nothing: each request stands alone, so nothing is held."""

    @property
    def opened_by(self) -> str:
        """The address of the server, or the command that shows the database."""
        if self._uri.startswith("http"):
            return self._uri
        return shlex.join(["mlflow", "ui", "--backend-store-uri", self._uri])


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {f"autodistill.{name}": value[:_LONGEST] for name, value in tags.items()}


def _milliseconds(time: float) -> int:
    return round(time * 1000)
