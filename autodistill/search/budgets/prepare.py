"""Shared preparation of several budgets: teacher and data, solved storages, this machine's speed, and the plans."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError, NothingFitsError, ShortTimeError
from autodistill.hardware.budget import Price
from autodistill.inference.torch_memory import give_back_memory
from autodistill.search.budgets.record import Part
from autodistill.search.budgets.request import BudgetsRequest
from autodistill.search.budgets.shared import shared
from autodistill.search.campaign.observer import Observer
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Place
from autodistill.search.prepare import describe, plan_anew
from autodistill.search.preview import plan_document
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_request
from autodistill.search.setup.loading import Loaded, load, load_again
from autodistill.search.setup.measure_plan import Paces, box_by_default
from autodistill.search.setup.solve_phase import construct_each
from autodistill.search.workplace import disk_faults, workplace
from autodistill.units import count_of, format_duration
from autodistill.utils.json_files import strict_json


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The search of one budget, planned."""

    config: SearchConfig
    loaded: Loaded
    plan: Plan
    speed: Speed


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The result of the preparation.

    Attributes:
        parts: The budgets, in the order in which they were typed.
        planned: The planned searches of the budgets with their own run, by label.
        box_seconds: Time budget for all, or None if there is none.
        place: Where they run.
    """

    parts: tuple[Part, ...]
    planned: Mapping[str, Planned]
    box_seconds: float | None
    place: Place

    def documents(self, price: Price | None) -> list[dict[str, Any]]:
        """Return what would be done for each budget, as plain data.

        Args:
            price: The price of an hour, or None if no cost is asked for.
        """
        found = []
        for part in self.parts:
            one = self.planned.get(part.label)
            plan = one and plan_document(one.config, one.loaded, one.plan, one.speed, self.place, price)
            found.append({"label": part.label, "run": part.run, "nothing_fits": part.nothing_fits, "plan": plan})
        return found


def prepare(request: BudgetsRequest, name: str, observer: Observer) -> Prepared:
    """Load, solve, measure and plan for all budgets. Only the cache is written.

    Args:
        request: What is asked.
        name: Name of the search. The names of its runs begin with it.
        observer: Shows phases and notes to the user.

    Raises:
        InputError: Bad input of any budget, or a time budget that does not hold a search for each.
        NothingFitsError: Nothing fits any of the budgets.
    """
    limits = request.limits()
    share = request.time / len(limits) if isinstance(request.time, float | int) else None
    asked = {label: request.alone(name=f"{name}-{label}", time=share, **limit) for label, limit in limits.items()}
    configs, refused = _checked(asked)
    # Load for the largest budget: a student that does not fit it fits none of the others.
    first = max(configs.values(), key=lambda one: one.budget.memory_bytes)
    for note in dict.fromkeys(note for one in configs.values() for note in one.notes):
        observer.line(note)
    folders = f"{first.out} and {first.cache}"
    with disk_faults(folders, lambda: "; and start it again"), workplace(first) as (place, _):
        observer.phase("loading teacher and data")
        began = time.monotonic()
        common = load(first, place)
        loading = time.monotonic() - began
        loaded = {}
        for label, config in dict(configs).items():
            try:
                loaded[label] = load_again(common, config, place)
            except NothingFitsError as error:
                refused[label] = str(error)
                del configs[label]
        if first.declared.solved:
            observer.phase("solving what fits")
            made = construct_each(list(configs.values()), common, observer.line)
            configs = dict(zip(configs, made, strict=True))
            give_back_memory()
        labels = list(configs)
        whose = shared(list(configs.values()))
        served = {label: labels[index] for label, index in zip(labels, whose, strict=True)}
        own = [label for label in labels if served[label] == label]
        observer.phase("measuring this machine")
        time_budget = _time_budget(request, first, common)
        division = _Division(
            time_budget, {label: (configs[label], loaded[label]) for label in own}, request.started, loading
        )
        planned = division.planned()
        give_back_memory()
    parts = []
    for label in limits:
        if label in refused:
            parts.append(Part(label=label, nothing_fits=refused[label]))
            continue
        mine = planned.get(label)
        config = configs[label]
        parts.append(
            Part(
                label=label,
                budget=config.budget.to_json(),
                run=configs[served[label]].name,
                search=None if mine is None else _document(mine),
            )
        )
    return Prepared(parts=tuple(parts), planned=planned, box_seconds=time_budget, place=place)


def _checked(asked: Mapping[str, SearchRequest]) -> tuple[dict[str, SearchConfig], dict[str, str]]:
    """Return the settings of each budget, and for budgets that nothing fits the reason.

    Raises:
        NothingFitsError: Nothing fits any of the budgets.
    """
    configs: dict[str, SearchConfig] = {}
    refused: dict[str, str] = {}
    largest: NothingFitsError | None = None
    for label, request in asked.items():
        try:
            configs[label] = check_request(request)
        except NothingFitsError as error:
            refused[label], largest = str(error), error
    if not configs:
        assert largest is not None
        raise NothingFitsError(f"nothing fits any of these budgets; of {next(reversed(refused))}: {largest}")
    return configs, refused


def _time_budget(request: BudgetsRequest, config: SearchConfig, loaded: Loaded) -> float | None:
    """Return the time budget for all in seconds, given or by default. None if trials and tokens fix the work."""
    if isinstance(request.time, float | int):
        return float(request.time)
    return None if config.trials and config.tokens else box_by_default(loaded)


def _document(planned: Planned) -> dict[str, Any]:
    # A start of 0.0 makes all sessions of the run count for its time budget.
    return strict_json(describe(planned.config, planned.loaded, planned.plan, planned.speed, 0.0))


class _Division:
    """Divides the remaining time equally among the searches.

    Args:
        time_budget: Seconds for all, or None if there is no time budget.
        searches: Settings, teacher and data of each search, by label.
        started: When the time budget began, by `time.monotonic()`.
        loading: Seconds that loading takes. Each run loads again when it begins.
    """

    def __init__(
        self,
        time_budget: float | None,
        searches: Mapping[str, tuple[SearchConfig, Loaded]],
        started: float,
        loading: float,
    ) -> None:
        self._time_budget, self._searches, self._started, self._loading = time_budget, searches, started, loading
        self._paces: Paces = {}

    def planned(self) -> dict[str, Planned]:
        """Plan each search for an equal part of the time that is left after this machine is measured.

        With a time budget, the first round of plans measures the machine. The second round divides what is left then.
        """
        if self._time_budget is not None:
            self._plans()
        return self._plans()

    def _plans(self) -> dict[str, Planned]:
        spent = time.monotonic() - self._started
        share = None if self._time_budget is None else max(1.0, (self._time_budget - spent) / len(self._searches))
        found, least = {}, 0.0
        for label, (config, loaded) in self._searches.items():
            try:
                made = plan_anew(replace(config, time_seconds=share), loaded, self._loading, self._paces)
            except ShortTimeError as error:
                least = max(least, error.seconds)
                continue
            found[label] = Planned(config=made[0], loaded=made[1], plan=made[2], speed=made[3])
        if least:
            assert self._time_budget is not None
            need = spent + len(self._searches) * least
            raise InputError(
                f"a time budget of {format_duration(self._time_budget)} does not hold a search for each of the "
                f"{count_of(len(self._searches), 'budget')} that have a student of their own: give --time "
                f"{_typed(need)} or more, or fewer budgets"
            )
        return found


def _typed(seconds: float) -> str:
    return f"{math.ceil(seconds)}s" if seconds < 600 else f"{math.ceil(seconds / 60)}m"
