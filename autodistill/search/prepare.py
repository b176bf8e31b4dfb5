"""Preparation of a run before its first trial: load, plan, write `search.json`, and score the teacher."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from autodistill.data.dataset import load_split
from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError, MissingDependencyError
from autodistill.estimates.training_fit import INSTALL_8BIT, has_eight_bit
from autodistill.export.model_card import NOT_STATED
from autodistill.hardware.environment import code, machine_here, versions
from autodistill.hardware.machine import detect
from autodistill.models.spec import ModelSpec
from autodistill.runs.events import RungReached, TrialAdded
from autodistill.runs.phase_clock import Clock
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.run_log import RunLog
from autodistill.runs.test_split_ledger import already_opened, times_opened
from autodistill.search.campaign.observer import Observer
from autodistill.search.campaign.state import Question
from autodistill.search.campaign.warm_start import WarmStart, warm_start
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Place
from autodistill.search.planning.plan import extend, more_trials
from autodistill.search.request.earlier_runs import check_fingerprints, steps_differ
from autodistill.search.request.metrics import moved
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.loading import Loaded, load
from autodistill.search.setup.measure_plan import Paces, plan_from_measurement
from autodistill.search.setup.rate_phase import for_plan, tested, to_test
from autodistill.search.setup.solve_phase import construct
from autodistill.search.setup.teacher_phase import cache_phase, check_cache_limit, solution_phase, teacher_phase
from autodistill.search.worker.messages import TrialSetting
from autodistill.utils.json_files import write_json
from autodistill.utils.typed_data import check_typed


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A loaded and planned run.

    Attributes:
        config: The request, with what was solved.
        loaded: Teacher, data and models.
        plan: How the time of the search is spent.
        speed: What was measured for the plan.
        document: The content of `search.json`.
    """

    config: SearchConfig
    loaded: Loaded
    plan: Plan
    speed: Speed
    document: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """All that the first trial needs.

    Attributes:
        config: The request, with the result of the test of learning rates.
        question: What the search looks for.
        setting: What all trials share.
        warm: Trials of earlier runs that the search begins with.
        document: The content of `search.json`.
    """

    config: SearchConfig
    question: Question
    setting: TrialSetting
    warm: WarmStart
    document: Mapping[str, Any]


def plan_run(config: SearchConfig, place: Place, run: RunFolder, clock: Clock, observer: Observer) -> Planned:
    """Load teacher and data, plan, and write `search.json`. A resumed run keeps its plan, except for added trials.

    Args:
        config: The checked request.
        place: Where it runs.
        run: Its folder, locked.
        clock: Times the phases.
        observer: Shows notes to the user.

    Raises:
        InputError: Bad input that shows only after teacher and data are loaded.
    """
    with clock.phase("load", "loading teacher and data"):
        loaded = load(config, place)
    if config.stored is not None:
        check_typed(config.stored["speed"], Speed, "speed of search.json")
        speed = Speed(**config.stored["speed"])
        plan = _extended(config, Plan.from_json(config.stored["plan"]), loaded.spec, speed, run.events)
        plan = _adapted_to_machines(plan, loaded)
        _check_fingerprints(config, loaded)
    else:
        fingerprints = {"teacher": loaded.teacher.fingerprint, "data": loaded.data.fingerprint}
        check_fingerprints(config.out, config.warm_start, fingerprints)
        # Check before anything is solved. `plan_anew` checks again, because solved constructions may need more cache.
        check_cache_limit(config, loaded)
        if config.declared.solved:
            with clock.phase("solve", "solving what fits"):
                config = construct(config, loaded, observer.line)
        with clock.phase("plan", "measuring this machine"):
            config, loaded, plan, speed = plan_anew(config, loaded, time.monotonic() - config.started)
    document = describe(config, loaded, plan, speed, clock.started_at)
    write_json(run.search_file, document)
    told = moved(config.requested.record, config.stored.get("asked", {})) if config.stored else ()
    for note in (
        *config.notes,
        *_test_split_warning(config, run, loaded),
        *told,
        *loaded.notes,
        *_too_long_questions(config, loaded),
        *plan.notes,
    ):
        observer.line(note)
    return Planned(config=config, loaded=loaded, plan=plan, speed=speed, document=document)


def plan_anew(
    config: SearchConfig, loaded: Loaded, spent: float, paces: Paces | None = None
) -> tuple[SearchConfig, Loaded, Plan, Speed]:
    """Plan a new run whose teacher and data are loaded and whose constructions are known.

    Args:
        config: The checked request.
        loaded: Teacher and data.
        spent: Seconds of the time budget that are already used.
        paces: See `plan_from_measurement`.

    Returns:
        The settings with the prior for this plan, `loaded` with the plan's step size, the plan, and the speed that the
        plan is based on.

    Raises:
        InputError: See `plan_from_measurement`. Also if the cache limit is too small for the teacher's outputs.
    """
    check_cache_limit(config, loaded)
    plan, speed = plan_from_measurement(config, loaded, spent, paces)
    differ = steps_differ(config.out, config.warm_start, plan.batch_tokens)
    plan = replace(plan, notes=(*loaded.of_teacher, *plan.notes, *differ))
    return for_plan(config, plan), loaded.stepping(plan.batch_tokens), plan, speed


def describe(config: SearchConfig, loaded: Loaded, plan: Plan, speed: Speed, started_at: float) -> dict[str, Any]:
    """Return the content of `search.json`, from which a run can be resumed.

    Args:
        config, loaded, plan, speed: As returned by `plan_anew`, or as stored.
        started_at: When the session began. A new time budget counts from then.
    """
    return _describe(config, loaded, plan, speed) | {"box": _time_budget(config, plan, started_at)}


def prepare_rows(planned: Planned, run: RunFolder, clock: Clock) -> Ready:
    """Score the teacher and write its rows. From here on, a stopped search can export one of them."""
    setting = teacher_phase(planned.config, planned.loaded, planned.plan, run, clock)
    return Ready(
        config=planned.config,
        question=_question(planned.config, planned, setting),
        setting=setting,
        warm=WarmStart(),
        document=planned.document,
    )


def prepare_trials(planned: Planned, ready: Ready, run: RunFolder, clock: Clock, observer: Observer) -> Ready:
    """Cache the teacher's outputs, test learning rates and read earlier runs. A resumed run keeps what it has."""
    config, document = planned.config, dict(ready.document)
    setting = cache_phase(config, planned.loaded, planned.plan, run, clock, ready.setting)
    if to_test(config, planned.plan, planned.loaded.workers) and "rates" not in document:
        with clock.phase("plan", "testing learning rates"):
            config, rates = tested(config, planned.plan, setting, observer.line)
        # The tested rate is written to disk before a trial uses it.
        document |= {"rates": rates, "space_definition": config.space.to_json()}
        write_json(run.search_file, document)
    solution_phase(config, planned.loaded, setting, run, clock)
    question = _question(config, planned, setting)
    if "observations" not in document["warm_start"]:
        # The observations are stored because the earlier runs may continue or be deleted before this one is resumed.
        document["warm_start"] = warm_start(config.out, config.warm_start, question).to_json()
        write_json(run.search_file, document)
    warm = WarmStart.from_json(document["warm_start"])
    return Ready(config=config, question=question, setting=setting, warm=warm, document=document)


def _question(config: SearchConfig, planned: Planned, setting: TrialSetting) -> Question:
    """Return the question that the campaign answers. The teacher is scored by now."""
    return Question(
        space=config.space,
        deployments=config.space.deployments,
        budget=config.budget,
        plan=planned.plan,
        speed=planned.speed,
        teacher_spec=planned.loaded.spec,
        teacher_accuracy=setting.teacher_accuracy,
        metric=config.metric,
        direction=config.direction,
        explore=config.explore,
        confirm=config.confirm,
        further=config.objectives[1:],
        served_on=config.device,
        device=planned.loaded.workers.device,
        students_only=config.students_only,
        goal=config.goal,
        raced=bool(config.constructions) and not config.objectives[1:],
        memory=planned.loaded.memory,
    )


def _test_split_warning(config: SearchConfig, run: RunFolder, loaded: Loaded) -> tuple[str, ...]:
    """Return a warning if a run is continued whose test split was already opened."""
    stored = config.stored
    if stored is None:
        return ()
    # A finished run that gets no more time or trials ends with the same result as before.
    ends = "seconds" in stored and not _extends(config, stored["plan"]["trials"])
    times = times_opened(run, loaded.data.fingerprint)
    if not times or (ends and config.confirm <= stored.get("confirm", 0)):
        return ()
    return (
        f"{already_opened(times)}, and the test figures of other exports of this run will not say how well a choice "
        "does on unseen documents",
    )


def _too_long_questions(config: SearchConfig, loaded: Loaded) -> tuple[str, ...]:
    """Return a note about questions that are too long for the context, if written answers are marked.

    Raises:
        InputError: All questions are too long.
    """
    questions = load_split(loaded.data.folder, "validation").questions if config.requested.written else None
    if questions is None:
        return ()
    context, count = config.budget.context, len(questions.entries)
    left = count - len(questions.within(context))
    said = f"{left} of {count} questions of the validation split do not fit a context of {context} with their answers"
    if left == count:
        raise InputError(f"{said}: give a larger --context or shorter prompts")
    return (f"{said}, and count as not answered",) if left else ()


def _extended(config: SearchConfig, plan: Plan, spec: ModelSpec, speed: Speed, log: RunLog) -> Plan:
    """Return the plan of a resumed run, with the trials asked for or those that fit into a finished run's new time.

    A run of a single strategy gets no further trials: its time goes to that strategy. If a finished run gets trials but
    no time, these trials have no time budget, because the old one was for the trials planned then.
    """
    assert config.stored is not None
    if config.strategy is not None:
        return plan
    trials = config.trials or plan.trials
    if _extends(config, plan.trials) and config.time_seconds is None:
        plan = replace(plan, box_seconds=None)
    elif "seconds" in config.stored and config.time_seconds is not None and config.trials is None:
        trials += more_trials(plan, spec.parameters, speed, config.time_seconds, config.explore)
    return extend(plan, trials, _passed(log, len(plan.rungs)))


def _passed(log: RunLog, rungs: int) -> tuple[int, ...]:
    """Return, for each rung except the last, how many proposed trials went past it according to the log."""
    proposed = {event.trial for event in log.of(TrialAdded) if event.number is not None}
    furthest = {event.trial: event.rung for event in log.of(RungReached) if event.trial in proposed}
    return tuple(sum(reached > rung for reached in furthest.values()) for rung in range(rungs - 1))


def _extends(config: SearchConfig, trials: int) -> bool:
    """Return whether a finished run with this number of trials is given more trials or more time."""
    stored = config.stored
    if stored is None or "seconds" not in stored:
        return False
    return config.time_seconds is not None or (config.trials or 0) > trials


def _time_budget(config: SearchConfig, plan: Plan, started_at: float) -> dict[str, float | None]:
    """Return the run's time budget in seconds, and the start of the session from which it counts.

    An unfinished run keeps its start, and a new time budget then covers the whole run. The extension of a finished run
    has its own start. Both values are stored, so a killed run keeps them.
    """
    given, stored = config.time_seconds, config.stored
    if stored is None:
        return {"seconds": plan.box_seconds, "since": started_at}
    if _extends(config, stored["plan"]["trials"]):
        return {"seconds": given, "since": started_at}
    before = stored.get("box", {"seconds": stored["plan"]["box_seconds"], "since": 0.0})
    return {**before, "seconds": given or before["seconds"]}


def _adapted_to_machines(plan: Plan, loaded: Loaded) -> Plan:
    """Adapt the plan of a resumed run to the machines it has now, without changing what its figures mean.

    Raises:
        InputError: Trials would be trained by another number of processes than planned, which would change the figures.
        MissingDependencyError: The plan has 8-bit optimiser states, and their package is not installed.
    """
    if plan.optimizer_state == "int8" and not has_eight_bit():
        raise MissingDependencyError(
            f"the run's trials are trained with 8-bit optimiser states, which need bitsandbytes: {INSTALL_8BIT}"
        )
    workers = loaded.workers
    if plan.processes != workers.processes:
        raise InputError(
            f"the run's trials are trained by {plan.processes} processes each, not {workers.processes}: resume it with "
            "the same --gpus-per-trial, or --cpus-per-trial"
        )
    return replace(
        plan,
        workers=workers.count,
        gpus=workers.gpus,
        threads=min(plan.threads, workers.threads),
        alone=workers.alone if plan.alone else 0,
    )


def _check_fingerprints(config: SearchConfig, loaded: Loaded) -> None:
    assert config.stored is not None
    found = [(name, getattr(loaded, name).fingerprint, config.stored[name]) for name in ("teacher", "data")]
    # Runs of older versions do not record the models that their students start from.
    pretrained = config.stored.get("pretrained", {})
    found += [
        (f"model {model}", one.fingerprint, pretrained[model])
        for model, one in loaded.pretrained_models.items()
        if model in pretrained
    ]
    for name, now, stored in found:
        before = stored["fingerprint"]
        if now != before:
            raise InputError(
                f"the {name} of the run {config.name!r} has changed since ({before}, now {now}): restore it, or start "
                "a new run under another --name"
            )


def _describe(config: SearchConfig, loaded: Loaded, plan: Plan, speed: Speed) -> dict[str, Any]:
    """Return the content of `search.json` without its time budget: all that is needed to run the search again."""
    if config.stored is not None:
        warm = config.stored.get("warm_start", {"runs": []})
        stored = dict(config.stored)
        if _extends(config, stored["plan"]["trials"]):
            # This entry marks a finished run, and the extended run is no longer finished.
            del stored["seconds"]
        stored["asked"] = dict(config.requested.record)
        stored |= _files(config)
        for part, reference in (("teacher", config.teacher_reference), ("data", config.data_reference)):
            stored[part] = {**stored[part], "reference": reference}
        return {**stored, "plan": plan.to_json(), "confirm": config.confirm, "warm_start": warm}
    return {
        "schema_version": 1,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": config.command,
        "folder": os.getcwd(),
        "budget": config.budget.to_json(),
        "teacher": {
            "reference": config.teacher_reference,
            "name": loaded.teacher.name,
            "fingerprint": loaded.teacher.fingerprint,
            "revision": loaded.teacher.revision,
            "quantised": loaded.teacher.quantized,
            "file": loaded.teacher.original,
            "stored_as": loaded.stored.name if loaded.stored else None,
            "parameters": loaded.spec.parameters,
            "layers": loaded.spec.layers,
            "process_bytes": loaded.spec.process_bytes,
            "held": loaded.teacher_fit.held_type,
            "rounded": loaded.teacher_fit.rounded,
        },
        "pretrained": {
            model: {"fingerprint": found.fingerprint, "revision": found.revision}
            for model, found in loaded.pretrained_models.items()
        },
        "data": {
            "reference": config.data_reference,
            "name": loaded.data.name,
            "fingerprint": loaded.data.fingerprint,
            "revision": config.source.revision,
            "tokens": {name: split.tokens for name, split in loaded.data.splits.items()},
            "answers": {
                name: {"tokens": split.answers, "with_log_probabilities": split.told}
                for name, split in loaded.data.splits.items()
            },
        },
        "templates": dict(loaded.templates),
        **_files(config),
        "space_hash": config.space.hash,
        "space_definition": config.space.to_json(),
        "kv_type": config.kv_type,
        "served_by": config.served_by,
        "candidates": list(config.candidates),
        "constructions": [one.to_json() for one in config.constructions],
        "metric": config.metric,
        "direction": config.direction,
        "objectives": [objective.name for objective in config.objectives],
        "device": config.device and config.device.to_json(),
        "directions": {one.name: one.direction for one in config.objectives if one.trained},
        "asked": dict(config.requested.record),
        "sampler": config.sampler,
        "explore": config.explore,
        "confirm": config.confirm,
        "students_only": config.students_only,
        "goal": config.goal,
        "scoring": config.scoring,
        "warm_start": {"runs": list(config.warm_start)},
        "seed": config.seed,
        "runner": config.runner,
        "storage": config.storage.uri if config.storage else None,
        "plan": plan.to_json(),
        "speed": asdict(speed),
        "licences": _licenses(loaded),
        "versions": versions(),
        "code": code(),
        "machine": {**machine_here(detect()), "trains_on": loaded.workers.device},
    }


def _files(config: SearchConfig) -> dict[str, Any]:
    """Return the references to what may be moved while a run is stopped, apart from its teacher and data."""
    return {
        "strategy": config.strategy,
        "space": config.space_reference,
        "baselines": config.baselines and list(config.baselines),
        "general_text": config.general_reference,
    }


def _licenses(loaded: Loaded) -> dict[str, str]:
    named = {loaded.teacher.name: loaded.teacher.license, loaded.data.name: loaded.data.license}
    return {name: license or NOT_STATED for name, license in named.items()}
