"""What several budgets share, made once: teacher and data, solved storages, what this machine does, and the plan."""

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
    """What was prepared.

    Attributes:
        parts: The budgets, as they were typed.
        planned: The searches of those with one of their own, by the budgets' labels.
        box_seconds: Time budget of all; None for none.
        place: Where they run.
    """

    parts: tuple[Part, ...]
    planned: Mapping[str, Planned]
    box_seconds: float | None
    place: Place

    def documents(self, price: Price | None) -> list[dict[str, Any]]:
        """Return what would be done for each budget, as plain data.

        Args:
            price: Of an hour; None where no cost is asked for.
        """
        found = []
        for part in self.parts:
            one = self.planned.get(part.label)
            plan = one and plan_document(one.config, one.loaded, one.plan, one.speed, self.place, price)
            found.append({"label": part.label, "run": part.run, "nothing_fits": part.nothing_fits, "plan": plan})
        return found


def prepare(request: BudgetsRequest, name: str, observer: Observer) -> Prepared:
    """Loads, solves, measures and plans for all budgets; nothing is written but into the cache.

    Args:
        request: What is asked.
        name: Of the search; those of the runs begin with it.
        observer: Is told of phases.

    Raises:
        InputError: Bad input of any budget, or a time budget that does not hold a search for each.
        NothingFitsError: Nothing fits any of them.
    """
    limits = request.limits()
    share = request.time / len(limits) if isinstance(request.time, float | int) else None
    asked = {label: request.alone(name=f"{name}-{label}", time=share, **limit) for label, limit in limits.items()}
    checked, refused = _checked(asked)
    # What does not fit the largest, with this teacher's tokens, fits none.
    first = max(checked.values(), key=lambda one: one.budget.memory_bytes)
    for note in dict.fromkeys(note for one in checked.values() for note in one.notes):
        observer.line(note)
    folders = f"{first.out} and {first.cache}"
    with disk_faults(folders, lambda: "; and start it again"), workplace(first) as (place, _):
        observer.phase("loading teacher and data")
        began = time.monotonic()
        common = load(first, place)
        loading = time.monotonic() - began
        loaded = {}
        for label, config in dict(checked).items():
            try:
                loaded[label] = load_again(common, config, place)
            except NothingFitsError as error:
                refused[label] = str(error)
                del checked[label]
        if first.declared.solved:
            observer.phase("solving what fits")
            made = construct_each(list(checked.values()), common, observer.line)
            checked = dict(zip(checked, made, strict=True))
            give_back_memory()
        labels = list(checked)
        whose = shared(list(checked.values()))
        served = {label: labels[index] for label, index in zip(labels, whose, strict=True)}
        own = [label for label in labels if served[label] == label]
        observer.phase("measuring this machine")
        box = _box(request, first, common)
        division = _Division(box, {label: (checked[label], loaded[label]) for label in own}, request.started, loading)
        planned = division.planned()
        give_back_memory()
    parts = []
    for label in limits:
        if label in refused:
            parts.append(Part(label=label, nothing_fits=refused[label]))
            continue
        mine = planned.get(label)
        config = checked[label]
        parts.append(
            Part(
                label=label,
                budget=config.budget.to_json(),
                run=checked[served[label]].name,
                search=None if mine is None else _document(mine),
            )
        )
    return Prepared(parts=tuple(parts), planned=planned, box_seconds=box, place=place)


def _checked(asked: Mapping[str, SearchRequest]) -> tuple[dict[str, SearchConfig], dict[str, str]]:
    """The settings of each budget, and of those that nothing fits the reason.

    Raises:
        NothingFitsError: Nothing fits any.
    """
    checked: dict[str, SearchConfig] = {}
    refused: dict[str, str] = {}
    largest: NothingFitsError | None = None
    for label, request in asked.items():
        try:
            checked[label] = check_request(request)
        except NothingFitsError as error:
            refused[label], largest = str(error), error
    if not checked:
        assert largest is not None
        raise NothingFitsError(f"nothing fits any of these budgets; of {next(reversed(refused))}: {largest}")
    return checked, refused


def _box(request: BudgetsRequest, config: SearchConfig, loaded: Loaded) -> float | None:
    """Return the seconds of the time budget for all of them, given or by default; None where the work is fixed
    instead.
    """
    if isinstance(request.time, float | int):
        return float(request.time)
    return None if config.trials and config.tokens else box_by_default(loaded)


def _document(planned: Planned) -> dict[str, Any]:
    # Of its time budget every session counts.
    return strict_json(describe(planned.config, planned.loaded, planned.plan, planned.speed, 0.0))


class _Division:
    """The time that is left, divided over the searches.

    Args:
        box: Seconds for all; None for none.
        searches: Settings, teacher and data of each, by label.
        started: When the time began, by `time.monotonic()`.
        loading: Seconds that loading takes, which each run does again when it begins.
    """

    def __init__(
        self, box: float | None, searches: Mapping[str, tuple[SearchConfig, Loaded]], started: float, loading: float
    ) -> None:
        self._box, self._searches, self._started, self._loading = box, searches, started, loading
        self._paces: Paces = {}

    def planned(self) -> dict[str, Planned]:
        """Plan each search for an equal part of what is left once this machine is measured."""
        if self._box is not None:
            self._plans()
        return self._plans()

    def _plans(self) -> dict[str, Planned]:
        spent = time.monotonic() - self._started
        share = None if self._box is None else max(1.0, (self._box - spent) / len(self._searches))
        found, least = {}, 0.0
        for label, (config, loaded) in self._searches.items():
            try:
                made = plan_anew(replace(config, time_seconds=share), loaded, self._loading, self._paces)
            except ShortTimeError as error:
                least = max(least, error.seconds)
                continue
            found[label] = Planned(config=made[0], loaded=made[1], plan=made[2], speed=made[3])
        if least:
            assert self._box is not None
            need = spent + len(self._searches) * least
            raise InputError(
                f"a time budget of {format_duration(self._box)} does not hold a search for each of the "
                f"{count_of(len(self._searches), 'budget')} that have a student of their own: give --time "
                f"{_typed(need)} or more, or fewer budgets"
            )
        return found


def _typed(seconds: float) -> str:
    return f"{math.ceil(seconds)}s" if seconds < 600 else f"{math.ceil(seconds / 60)}m"
