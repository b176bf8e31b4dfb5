"""The record of a search for several budgets: which budgets share a student, and the time of each run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from autodistill.errors import InputError
from autodistill.hardware.budget import Budget, read_budget
from autodistill.runs.run_folder import RunFolder
from autodistill.utils.json_files import read_json, write_json
from autodistill.utils.typed_data import check_typed

RECORD = "budgets.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """One budget of a search for several, and the run that serves it.

    Attributes:
        label: Its name, like "150MB" or "pi-5".
        budget: The limits in the form of `Budget.to_json`, or None if nothing fits them.
        run: Name of the run that serves it, possibly the run of a smaller budget. None if nothing fits.
        search: The content of `search.json` that the run begins with, or None if the budget has no run of its own.
        nothing_fits: A sentence about why nothing fits.
        seconds: Time budget of its run, written to disk before the run begins. None until it is decided.
    """

    label: str
    budget: Mapping[str, Any] | None = None
    run: str | None = None
    search: Mapping[str, Any] | None = None
    nothing_fits: str | None = None
    seconds: float | None = None

    @property
    def limits(self) -> Budget:
        """The budget. Only valid if something fits it."""
        assert self.budget is not None
        return read_budget(self.budget)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The record of a search for several budgets.

    Attributes:
        name: Name of the search.
        command: The command line as typed.
        created: Time of creation.
        parts: The budgets, in the order in which they were typed.
        box_seconds: Time budget for all of them together, or None if there is none.
        prepared_seconds: Seconds used before the first run, for loading, solving, measuring and planning.
        schema_version: Version of this file.
    """

    name: str
    command: str
    created: str
    parts: tuple[Part, ...]
    box_seconds: float | None
    prepared_seconds: float
    schema_version: int = _VERSION

    @property
    def own(self) -> tuple[Part, ...]:
        """The budgets with their own run, in the order of their runs: the smallest first."""
        return tuple(sorted((one for one in self.parts if one.search), key=lambda one: one.limits.memory_bytes))

    def serving(self, part: Part) -> Part:
        """Return the budget whose run serves this one."""
        return next(one for one in self.parts if one.search and one.run == part.run)

    def giving(self, part: Part, seconds: float) -> Record:
        """Return a copy in which the run of this budget has this time budget."""
        parts = tuple(replace(one, seconds=seconds) if one.label == part.label else one for one in self.parts)
        return replace(self, parts=parts)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the result of `asdict` back.

        Raises:
            InputError: The data are not as a search writes them.
        """
        check_typed(data, cls, RECORD)
        made = cls(**{**data, "parts": tuple(Part(**one) for one in data["parts"])})
        if made.schema_version != _VERSION:
            raise InputError(f"{RECORD} is of version {made.schema_version}, and this program reads {_VERSION}")
        known = {one.run for one in made.parts if one.search}
        if not known or any(one.run not in known for one in made.parts if one.run is not None):
            raise InputError(f"{RECORD} is not whole: a budget has no run; restore it from a copy")
        return made


class BudgetsFolder(RunFolder):
    """The folder of a search for several budgets, next to its runs. It is locked and found like a run's folder."""

    @property
    def search_file(self) -> Path:
        """The file with the record of the search."""
        return self.path / RECORD

    def read(self) -> Record:
        """Read the record.

        Raises:
            InputError: The file is not as a search writes it.
        """
        return Record.from_json(read_json(self.search_file))

    def write(self, record: Record) -> None:
        """Write the whole record."""
        write_json(self.search_file, asdict(record))

    @staticmethod
    def _left_over(path: Path) -> bool:
        return RunFolder._left_over(path) or (path.name.startswith(f".{Path(RECORD).stem}.") and path.suffix == ".json")


def runs_of(out: Path, name: str) -> list[str]:
    """Return the names of the runs of a search for several budgets. Empty if there is no such search.

    Args:
        out: Folder that holds the runs.
        name: Name of the search.
    """
    file = out / name / RECORD
    if not file.is_file():
        return []
    return [one.run for one in Record.from_json(read_json(file)).own if one.run is not None]
