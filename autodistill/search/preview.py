"""Preview of a search without running it: its plan, its cost and what fits."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.hardware.budget import Price
from autodistill.search.campaign.observer import Observer
from autodistill.search.planning.cost import cost, students_disk
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Place
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_request
from autodistill.search.setup.loading import Loaded, load
from autodistill.search.setup.measure_plan import plan_from_measurement
from autodistill.search.setup.solve_phase import construct
from autodistill.search.setup.teacher_phase import cache_settings, calibration_file, check_cache_limit
from autodistill.search.workplace import disk_faults, workplace


def plan_search(request: SearchRequest, observer: Observer | None = None, price: Price | None = None) -> dict[str, Any]:
    """Return what a search would do, as plain data. Only the shared cache of teacher and data is written.

    Raises:
        InputError: Bad input, or a resumed run, which already has its plan.
    """
    if request.resume:
        raise InputError(
            "--plan shows what a new search would do, and a run that goes on keeps the plan in its search.json: leave "
            "out --plan or --resume"
        )
    check_shows_nothing(request)
    config = check_request(request)
    with disk_faults(str(config.cache), lambda: ""), workplace(config) as (place, _):
        told = observer or Observer()
        return _plan(config, place, told, price)


def check_shows_nothing(request: SearchRequest) -> None:
    """Refuse options that show a running search, because a plan trains nothing.

    Raises:
        InputError: Such an option was given.
    """
    for option, shown in (("--metrics-port", request.metrics_port is not None), ("--dashboard", request.dashboard)):
        if shown:
            raise InputError(f"--plan trains nothing that could be watched: leave out --plan or {option}")


def _plan(config: SearchConfig, place: Place, observer: Observer, price: Price | None) -> dict[str, Any]:
    observer.phase("loading teacher and data")
    loaded = load(config, place)
    check_cache_limit(config, loaded)
    if config.declared.solved:
        observer.phase("solving what fits")
        config = construct(config, loaded, observer.line)
    observer.phase("measuring this machine")
    plan, speed = plan_from_measurement(config, loaded, time.monotonic() - config.started)
    return plan_document(config, loaded.stepping(plan.batch_tokens), plan, speed, place, price)


def plan_document(
    config: SearchConfig, loaded: Loaded, plan: Plan, speed: Speed, place: Place, price: Price | None
) -> dict[str, Any]:
    """Return what a planned search would do, as plain data.

    Args:
        config: The checked request, with what was solved.
        loaded: Teacher and data, with the plan's step size.
        plan: The plan of the search.
        speed: The speed that the plan is based on.
        place: Where it would run.
        price: The price of an hour, or None if no cost is asked for.
    """
    settings = cache_settings(config.space, loaded.spec, plan.bf16, calibration_file(config, loaded))
    tokens = min(plan.most_tokens, loaded.data.splits["train"].sequences * plan.sequence_length)
    per_token = settings.bytes_per_token(loaded.spec.vocabulary, loaded.spec.width)
    return {
        "plan": plan.to_json(),
        "speed": asdict(speed),
        "cache_bytes": tokens * per_token,
        **students_disk(
            plan,
            loaded.most_parameters,
            baselines=len(config.space.baselines),
            confirm=config.confirm,
        ),
        "training_bytes": {**loaded.fit.estimate.parts, "total_bytes": loaded.fit.estimate.total_bytes},
        "evaluation_bytes": loaded.fit.evaluation_bytes,
        "budget": config.budget.to_json(),
        "baselines": list(config.space.baselines),
        "constructions": [one.to_json() for one in config.constructions],
        "fits": [one.describe() for one in config.constructions],
        "notes": list(loaded.notes),
        "expected_seconds": sum(plan.seconds.values()),
        **cost(plan, place.machines, price),
    }
