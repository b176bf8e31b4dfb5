"""The result of a search as a single JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autodistill.distillation.training.plan import Plan
from autodistill.models.families import WHOLE_FAMILIES
from autodistill.runs.results.differences import differences
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.objectives import front
from autodistill.runs.results.row import Row, Status
from autodistill.runs.results.selection import contenders
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.savings import saved
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.finish.finish import Finish
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.shortfall import short_of_the_end, shortfall


def result_document(
    config: SearchConfig,
    campaign: Campaign,
    rows: list[Row],
    finished: Finish,
    plan: Plan,
    seconds: Mapping[str, float],
    run: RunFolder,
    data_notes: Sequence[str],
) -> dict[str, Any]:
    """Return the result of a search as a single JSON document."""
    ranked = rank(contenders(rows), config.metric, config.direction)
    short = short_of_the_end(finished.best, rows, config, run, plan)
    alone = config.constructions and not config.space.baselines
    recipe = "quantized" if config.spec.architecture in WHOLE_FAMILIES else "hand_designed"
    beside = [f"no hand-designed recipe was trained to be beaten: --baseline {recipe} has one"] if alone else []
    notes = [*data_notes, *plan.notes, *short, *finished.notes, *shortfall(campaign, plan), *beside]
    return {
        "name": run.name,
        "best": finished.best.to_json(),
        "rows": [one.row.to_json() for one in ranked],
        "objectives": [objective.name for objective in config.objectives],
        "front": [row.to_json() for row in front(rows, config.objectives)],
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
        "budget": config.budget.to_json(),
        "plan": plan.to_json(),
        "seconds": dict(seconds),
        "saved": saved(run.events.all(), plan).to_json(),
        "notes": notes,
        "paths": {"run": str(run.path), **{name: str(path) for name, path in finished.paths.items()}},
    }


def _without_student(campaign: Campaign, status: Status) -> list[dict[str, Any]]:
    """Return the trials that ended with this status, each with its strategy and the reason."""
    return [
        {"trial": trial.task.id, "strategy": trial.task.strategy.to_json(), "reason": trial.reason}
        for trial in campaign.trials.values()
        if trial.status is status
    ]
