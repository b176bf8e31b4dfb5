"""Reproduction of a row from the records of its run, and its comparison with the original row."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from autodistill.errors import InputError
from autodistill.evaluation.precision import check_scoring
from autodistill.hardware.environment import code, machine_here, versions
from autodistill.hardware.machine import detect, detect_for_training
from autodistill.runs.events import RowAdded, RungReached, TrialAdded
from autodistill.runs.phase_clock import Clock
from autodistill.runs.results.beginnings import trained_trial
from autodistill.runs.results.differences import paired, paired_difference
from autodistill.runs.results.make_row import make_row
from autodistill.runs.results.row import Row, Status
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.run_log import RunLog
from autodistill.runs.students import kept_after
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.observer import Observer
from autodistill.search.planning.placement import Place, check_share
from autodistill.search.prepare import Planned, Ready, plan_run, prepare_rows, prepare_trials
from autodistill.search.request.registered import check_again
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.setup.teacher_phase import before_trials
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.trial import Trial
from autodistill.units import with_error

Verdict = Literal["identical", "within its error", "different"]
# The student's figures on its text. Figures that depend on a runtime or a machine, or were only reported, are left out.
_FIGURES = ("accuracy", "perplexity", "agreement", "kl", "ece")


@dataclass(frozen=True, kw_only=True)
class Remade:
    """Comparison of a row with its reproduction.

    Attributes:
        run, row: Names of the run and of the row.
        verdict: "identical" if every figure, also of each document, is the same to the last bit. "within its error" if
            the metric differs by no more than the row's standard error. Otherwise "different".
        metric: The metric that the verdict is about.
        figures: By name, each figure before and now.
        difference, stderr: The metric now minus before, paired by document, and its standard error. None if the rows
            cannot be paired.
        environment: Sentences about differences in code, packages and machine.
        seconds: How long the reproduction took.
    """

    run: str
    row: str
    verdict: Verdict
    metric: str
    figures: Mapping[str, tuple[float, float]]
    difference: float | None
    stderr: float | None
    environment: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return asdict(self) | {"figures": {name: list(pair) for name, pair in self.figures.items()}}

    def describe(self) -> str:
        """Return the comparison as lines for a person."""
        lines = [f"{self.row} of {self.run}, made again in {self.seconds:.0f}s: {self.verdict}."]
        lines += [f"  {name}: {before:.10g} before, {now:.10g} now" for name, (before, now) in self.figures.items()]
        if self.verdict != "identical" and self.difference is not None:
            difference = with_error(self.difference, self.stderr, "+.4f")
            lines.append(f"  {self.metric}, paired by document: {difference}")
        differs = self.environment or ("nothing that the run recorded",)
        lines.append(f"What differs from then: {'; '.join(differs)}.")
        return "\n".join(lines)


def remake(
    run: RunFolder,
    row: Row,
    cache: Path,
    notify: Callable[[str], None] = lambda line: None,
    **moved: str | Path | None,
) -> Remade:
    """Train and evaluate a row's student again in the same way as its run, and compare. The run stays unchanged.

    Args:
        run: The row's run.
        row: A row of the validation split: of the teacher, of a file given by the user, or of a trial.
        cache: Folder of teachers, data and the teacher's outputs. Missing ones are made again.
        notify: Called with each phase.
        moved: Where the run's `teacher`, `data` or `general_text` is now, if it was moved.

    Raises:
        InputError: The row is of the test split, which is read only once, or is the beginning of another row. Or the
            teacher or the data are missing or have changed. Or the run used an object registered in a Python session,
            and it is not registered now.
    """
    if row.split == "test":
        raise InputError(f"{row.row_id} is of the test split, which a run reads once: reproduce a row of validation")
    if row.kind == "initial" and not before_trials(row):
        raise InputError(f"{row.row_id} is a beginning of another row: reproduce that one, or a row of the teacher")
    check_again(run.read_settings().get("asked", {}), "reproduce")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autodistill-") as folder:
        made = _made(run, row, Path(folder), cache, notify, moved)
    return compare(run.name, row, made, run.read_settings("metric"), time.monotonic() - began)


def compare(name: str, row: Row, made: Row, settings: Mapping[str, Any], seconds: float) -> Remade:
    """Compare a row with its reproduction.

    Args:
        name: Name of the run.
        row, made: The row before and now.
        settings: The content of `search.json`, which includes the environment of the run.
        seconds: How long the reproduction took.
    """
    metric = str(settings["metric"])
    figures = {
        figure: (before, now)
        for figure in dict.fromkeys((metric, *_FIGURES))
        if (before := row.figure(figure)) is not None and (now := made.figure(figure)) is not None
    }
    same = bool(figures) and all(before == now for before, now in figures.values())
    verdict: Verdict = "different"
    if same and _documents(row) == _documents(made):
        verdict = "identical"
    elif metric in figures:
        error = row.figure(f"{metric}_stderr")
        if error is not None and abs(figures[metric][1] - figures[metric][0]) <= error:
            verdict = "within its error"
    found = paired_difference(paired(made, metric), paired(row, metric))
    return Remade(
        run=name,
        row=row.row_id,
        verdict=verdict,
        metric=metric,
        figures=figures,
        difference=None if found is None else found[0],
        stderr=None if found is None else found[1],
        environment=environment_differs(settings),
        seconds=seconds,
    )


def environment_differs(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return sentences about code, packages and machine that differ from those of a run.

    Args:
        settings: The content of `search.json`.
    """
    now = {"package": versions(), "code": code(), "machine": machine_here(detect())}
    before = {"package": settings.get("versions"), "code": settings.get("code"), "machine": settings.get("machine")}
    told = [f"the run does not say its {part}" for part, held in before.items() if not held]
    for part, held in before.items():
        for name, value in now[part].items():
            if held and name in held and held[name] != value:
                told.append(f"{part} {name} was {held[name]}, and is {value}")
    return tuple(told)


def _documents(row: Row) -> Any:
    documents = row.documents or {}
    return [documents.get(part) and list(documents[part]) for part in ("ids", "count", "sum")]


class _PhaseObserver(Observer):
    """Reports only phases."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify

    def phase(self, name: str) -> None:
        self._notify(name)


def _made(
    run: RunFolder,
    row: Row,
    folder: Path,
    cache: Path,
    notify: Callable[[str], None],
    moved: Mapping[str, Any],
) -> Row:
    """Make the row again in a copy of the run. The copy's log has the row's trial, but none of the trial's results."""
    copy = folder / run.name
    copy.mkdir()
    shutil.copyfile(run.search_file, copy / run.search_file.name)
    stored = run.read_settings("metric", "direction", "plan", "space_definition", "speed", "teacher", "data")
    log = RunLog(copy / run.events.path.name)
    for event in run.events.all():
        other = isinstance(event, RowAdded) and before_trials(event.row) and event.row.row_id != row.row_id
        if other or (isinstance(event, TrialAdded) and event.trial == trained_trial(row)):
            log.add(event)
    request = SearchRequest(
        resume=True,
        name=run.name,
        runs=folder,
        strategy=stored.get("strategy"),
        recorded_space=True,
        runner="inline",
        cache=cache,
        command="autodistill reproduce",
        **moved,
    )
    config, here, told = check_request(request), detect_for_training(), _PhaseObserver(notify)
    share = check_share((here,), config.gpus_per_trial, config.cpus_per_trial, config.runner)
    check_scoring(config.scoring, (here,))
    place = Place(here=here, machines=(here,), share=share)
    with RunFolder.open(folder, run.name, lock=True) as scratch:
        clock = Clock(time.monotonic(), notify)
        planned = plan_run(config, place, scratch, clock, told)
        ready = prepare_rows(planned, scratch, clock)
        if before_trials(row):
            rows = scratch.events.rows(split="validation")
            found = next((one for one in rows if one.row_id == row.row_id), None)
            if found is None:
                raise InputError(
                    f"{row.row_id} is of an earlier version, which packed the file again: reproduce another"
                )
            return found
        ready = prepare_trials(planned, ready, scratch, clock, told)
        notify(f"training {trained_trial(row)}")
        return _trained(planned, ready, scratch, row, run.events.of(RungReached))


def _trained(planned: Planned, ready: Ready, scratch: RunFolder, row: Row, rungs: Sequence[RungReached]) -> Row:
    """Train a trial from its beginning in this process, and return its row."""
    question, plan = ready.question, planned.plan
    campaign = Campaign(
        question,
        sampler=Sampler(ready.config.space, name=ready.config.sampler, seed=ready.config.seed),
        log=scratch.events,
        checkpoints=scratch.checkpoints,
    )
    campaign.replay(scratch.events.all())
    state = campaign.trials.get(trained_trial(row))
    if state is None or state.candidate.spec is None:
        raise InputError(f"the log of the run does not say how {row.row_id} was made: it cannot be made again")
    own = [rung for rung in rungs if rung.trial == state.task.id]
    task = replace(state.task, probe=row.deployment)
    if task.straight and row.train_tokens:
        # A trial whose time ran out was trained on fewer tokens than planned.
        task = replace(task, length=row.train_tokens / plan.tokens)
    setting = replace(ready.setting, device=planned.loaded.workers.device)
    bench = Workbench(setting)
    threads = plan.alone if task.length > 1 else 0
    torch.set_num_threads(threads or plan.threads)
    trial, report = Trial(bench, task, threads=threads), None
    reached = [rung.rung for rung in own if rung.tokens == row.train_tokens]
    last = max(reached, default=len(plan.rungs) - 1)
    for rung in range(last if task.straight else 0, last + 1):
        report = trial.run(rung, keep=rung == last)
    assert report is not None  # the trial runs in a single process, which always reports
    evaluation = report.evaluation
    if row.interpolation is not None:
        evaluation = trial.evaluate_part_way(row.interpolation, row.deployment, kept_after(row))
    made = make_row(
        evaluation,
        trial=row.trial,
        kind=row.kind,
        name=row.name,
        strategy=task.strategy,
        spec=state.candidate.spec,
        status=Status(row.status),
        split="validation",
        budget=question.budget,
        plan=plan,
        train_tokens=report.tokens,
        train_seconds=report.seconds["train"],
        seed=task.seed,
        device=question.served_on,
    )
    return replace(made, interpolation=row.interpolation)
