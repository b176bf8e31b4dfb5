"""The trials of a run as an Optuna study, in a journal file that optuna-dashboard can open."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Literal

from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.runs.events import RungReached, TrialAdded, TrialEnded, of_kind
from autodistill.runs.results.row import Status
from autodistill.runs.run_folder import RunFolder
from autodistill.search.algorithms.optuna_study import Observation, ShownTrial, write_journal
from autodistill.strategy.space import Space
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import unwritable


def write_study(run: RunFolder, path: Path) -> str:
    """Write the trials that a run proposed within its space into a journal file.

    Returns:
        The command line that opens the file.

    Raises:
        InputError: The file already exists or cannot be written, or the run has no such trial.
    """
    if path.exists():
        raise InputError(f"{path} exists, and a journal is only ever added to: name another file with --out")
    asked = run.read_settings("metric", "direction", "plan", "space_definition")
    plan, space = Plan.from_json(asked["plan"]), Space.stored(asked["space_definition"])
    trials = _trials(run, plan)
    if not trials:
        raise InputError(f"the run {run.name!r} has no trial within its space yet: there is no study to write")
    try:
        make_folder(path.absolute().parent)
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".study.") as folder:
            written = Path(folder) / path.name
            write_journal(written, run.name, space, trials, asked["direction"])
            written.replace(path)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    return shlex.join(["optuna-dashboard", str(path)])


def _trials(run: RunFolder, plan: Plan) -> list[ShownTrial]:
    events = run.events.all()
    ends = {end.trial: end for end in of_kind(events, TrialEnded)}
    found = []
    for trial in of_kind(events, TrialAdded):
        if trial.point is None:
            continue  # a baseline or an extended training, which is no point of the space
        rungs = [rung for rung in of_kind(events, RungReached) if rung.trial == trial.trial and rung.value is not None]
        end, last = ends.get(trial.trial), max(rungs, key=lambda rung: rung.tokens, default=None)
        slack = end.miss["slack"] if end is not None and end.miss is not None else None
        state: Status | Literal["running"] = "running" if end is None else end.status
        if state == Status.REJECTED and not (slack or 0.0) > 0:
            slack = 1.0  # a strategy that contradicts its teacher misses no limit, but must count as infeasible
        observation = Observation(
            point=trial.point,
            state=state,
            value=last.value if last else None,
            fidelity=last.tokens / plan.tokens if last else 0.0,
            constraint=slack,
        )
        notes = {"trial": trial.trial, "name": trial.name, "seed": trial.seed}
        notes |= {"reason": end.reason} if end is not None and end.reason else {}
        values = {rung.tokens: rung.value for rung in rungs if rung.value is not None}
        found.append(ShownTrial(observation=observation, notes=notes, rungs=values))
    return found
