"""Write trials as runs of Weights & Biases, offline unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.trackers.base import Tracker
from autodistill.trackers.trials import Point, TrackedTrial, identity_of

if TYPE_CHECKING:
    from wandb import Run

_PROJECT = "autodistill"
_NAME = re.compile(r"[^/\\#?%:]{1,128}\Z")


class WandbTracker(Tracker):
    """Writes into `./wandb`, or into the folder of WANDB_DIR. A place is the name of a project.

    Nothing leaves the machine unless WANDB_MODE=online is set. `wandb sync` can send it later. A trial has the same id
    each time, so data that are sent twice form one run.
    """

    def __init__(self, run: RunFolder, place: str | None) -> None:
        super().__init__(run, place)
        self._project = place or _PROJECT
        self._runs: dict[str, Run] = {}
        self._written: list[str] = []

    @classmethod
    def check(cls, place: str | None) -> None:
        """Refuse a text that is not the name of a project."""
        if place is not None and not _NAME.match(place):
            raise InputError(f"wandb={place} names no project: it may have 128 characters, without / \\ # ? % :")

    def send(self, trial: TrackedTrial, points: Sequence[Point], *, first: bool, last: bool) -> None:
        """Log the settings of a new trial, metrics by tokens, and its final figures at the end of the session."""
        run = self._runs.get(trial.trial)
        if run is None:
            run = self._runs[trial.trial] = self._began(trial)
        for point in points:
            run.log(dict(point.values), step=point.tokens)
        if last and trial.status is not None:
            for name, value in (*trial.final.items(), ("status", trial.status), ("reason", trial.tags.get("reason"))):
                if value is not None:
                    run.summary[name] = value
            run.finish(exit_code=int(trial.status == "failed"))
            del self._runs[trial.trial]

    def _began(self, trial: TrackedTrial) -> Run:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        run = wandb.init(
            project=self._project,
            group=self.run.name,
            name=trial.title[:128],
            id=f"{identity_of(self.run)}-{trial.trial}",
            job_type=trial.tags["kind"],
            config={**trial.params, **{name: trial.tags[name] for name in ("run", "teacher", "data", "budget")}},
            mode="online" if mode == "online" else "disabled" if mode == "disabled" else "offline",
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True
            ),
        )
        folder = str(Path(run.dir).parent)
        if folder not in self._written:
            self._written.append(folder)
        return run

    @property
    def opened_by(self) -> str:
        """The command that sends what was written, or the project's address."""
        if os.environ.get("WANDB_MODE") == "online":
            return f"https://wandb.ai, project {self._project}"
        return shlex.join(["wandb", "sync", *self._written])

    def close(self) -> None:
        """End the runs of trials that have not ended. A later session continues them."""
        for run in self._runs.values():
            run.finish()
        self._runs.clear()
