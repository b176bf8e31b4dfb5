"""The request for a search for several budgets, as typed by the user."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.options import Option, parsed
from autodistill.search.budgets.record import RECORD
from autodistill.search.request.request import SearchRequest, check_room
from autodistill.units import parse_bytes, written_bytes

MOST = 12
"""Largest number of budgets in one search. More are a typing error, and would leave too little time for each."""

_SHARED = ("budget", "device", "latency", "devices", "context", "batch")
_FIXED = (
    *("trials", "tokens", "sequence_length", "step_tokens", "explore", "confirm"),
    *("warm_start", "kv_type", "runtime", "candidate"),
)


@dataclass(frozen=True, kw_only=True)
class BudgetsRequest(SearchRequest):
    """A request for one student, or for one student for each of several budgets."""

    budgets: Annotated[
        str | Sequence[str | int] | None,
        Option(
            help="Memory limits, like 1GB,2GB,4GB: one search, a student for each. They share --time.",
            metavar="SIZES",
            section="Budget",
            commands=("search",),
        ),
    ] = None
    tiers: Annotated[
        str | Sequence[str] | None,
        Option(
            help='Devices, like "pi 5, rtx 4060 ti 16gb": one search, a student for each. They share --time.',
            metavar="NAMES",
            section="Budget",
            commands=("search",),
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse options that contradict several budgets, before any device is looked up."""
        if self.budgets is not None and self.tiers is not None:
            raise InputError("--budgets are limits of memory and --tiers are devices: give one of the two")
        if self.budget is not None and (self.budgets is not None or self.tiers is not None):
            raise InputError("--budget is one limit, and --budgets or --tiers are several: give one of them")
        if self.tiers is not None and self.device is not None:
            raise InputError("--device is one device and --tiers are several: give one of the two")
        super().__post_init__()

    @property
    def several(self) -> bool:
        """Whether this is a search for several budgets, new or resumed."""
        if self.budgets is not None or self.tiers is not None:
            return True
        return self.resume and self.name is not None and (Path(self.runs) / self.name / RECORD).is_file()

    def _check_limits(self) -> None:
        if self.budgets is None and self.tiers is None:
            super()._check_limits()
            return
        self.limits()
        if self.devices and self.device is None and self.tiers is None:
            raise InputError("--devices only describes devices: choose one with --device, or several with --tiers")
        limits = parsed(self.latency)
        check_room(self.batch, limits or (), "--batch")
        context, batch = (1 if given is None else given for given in (parsed(self.context), self.batch))
        Budget(memory_bytes=1, context=context, batch=batch)

    def apart(self) -> Sequence[SearchRequest]:
        """Return one request for each of the budgets."""
        if self.budgets is None and self.tiers is None:
            return super().apart()
        return [self.alone(**limit) for limit in self.limits().values()]

    def limits(self) -> dict[str, dict[str, Any]]:
        """Return the settings that differ between the budgets' requests, by label.

        Raises:
            InputError: An empty or repeated budget, fewer than two, or more than `MOST`.
        """
        option = "--budgets" if self.tiers is None else "--tiers"
        given = self.budgets if self.tiers is None else self.tiers
        words = given.split(",") if isinstance(given, str) else list(given or ())
        texts = [written_bytes(one) if isinstance(one, int) else " ".join(one.split()) for one in words]
        if not all(texts):
            raise InputError(f"{option} {given!r} has an empty part: write {self._like(option)}")
        found: dict[str, dict[str, Any]] = {}
        known: dict[Any, str] = {}
        for text, word in zip(texts, words, strict=True):
            limit: Any = text if self.tiers is not None else parse_bytes(word) if isinstance(word, str) else word
            same = limit.casefold().replace("-", " ") if isinstance(limit, str) else limit
            label = re.sub(r"[^A-Za-z0-9.]+", "-" if self.tiers is not None else "", text).strip("-.")
            if same in known or label in found:
                raise InputError(f"{option} has {text} twice ({known.get(same, label)} is the same): leave one out")
            known[same] = text
            found[label] = {"device": limit} if self.tiers is not None else {"budget": limit, "device": self.device}
        if not 2 <= len(found) <= MOST:
            one = "--budget" if self.tiers is None else "--device"
            raise InputError(
                f"{option} takes 2 to {MOST}, like {self._like(option)}, not {len(found)}: for a single one give {one}"
            )
        return found

    @staticmethod
    def _like(option: str) -> str:
        return "1GB,2GB,4GB" if option == "--budgets" else '"pi 5, rtx 4060 ti 16gb"'

    def alone(self, **changes: Any) -> SearchRequest:
        """Return the request for a single search, with these changes."""
        given = {one.name: getattr(self, one.name) for one in fields(SearchRequest)}
        return SearchRequest(**(given | changes))

    def going_on(self, name: str, command: str, *, seconds: float | None, started: float, first: bool) -> SearchRequest:
        """Return the request that continues the run of one budget. The budget itself is in the run's `search.json`.

        Args:
            name: Name of the run.
            command: The command line that continues this run alone.
            seconds: Its time budget, or None for the one it has.
            started: When its time began, by `time.monotonic()`.
            first: Whether the run was planned for this same request. Its plan then already has these settings.
        """
        left_out = (*_SHARED, *(_FIXED if first else ()))
        changes = {"name": name, "command": command, "time": seconds, "started": started, "resume": True}
        return self.alone(**dict.fromkeys(left_out), **changes)
