"""What a search for several budgets decided, in one file: which budgets share a student, and which have what time."""

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
        label: What it is called, like "150MB" or "pi-5".
        budget: The limits, as `Budget.to_json`; None where nothing fits them.
        run: Name of the run that serves it, which may be that of a smaller budget; None where nothing fits.
        search: Content of the `search.json` that the run begins with, of a budget with a run of its own.
        nothing_fits: Why nothing fits, in a sentence.
        seconds: Time budget that its run was given, once that is decided; written down before the run begins.
    """

    label: str
    budget: Mapping[str, Any] | None = None
    run: str | None = None
    search: Mapping[str, Any] | None = None
    nothing_fits: str | None = None
    seconds: float | None = None

    @property
    def limits(self) -> Budget:
        """The budget, of one that something fits."""
        assert self.budget is not None
        return read_budget(self.budget)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The record of a search for several budgets.

    Attributes:
        name: Of the search.
        command: As it was typed.
        created: When.
        parts: The budgets, as they were typed.
        box_seconds: Time budget for all of them together; None for none.
        prepared_seconds: Of that what came before the first run: loading, solving, measuring and planning.
        schema_version: Of this file.
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
        """The budgets with a run of their own, in the order in which these are run: the smallest first."""
        return tuple(sorted((one for one in self.parts if one.search), key=lambda one: one.limits.memory_bytes))

    def serving(self, part: Part) -> Part:
        """The budget whose run serves this one."""
        return next(one for one in self.parts if one.search and one.run == part.run)

    def giving(self, part: Part, seconds: float) -> Record:
        """The same where a budget's run is given so much time."""
        parts = tuple(replace(one, seconds=seconds) if one.label == part.label else one for one in self.parts)
        return replace(self, parts=parts)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`.

        Raises:
            InputError: It is not what a search writes.
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
    """The folder of a search for several budgets, locked and found as a run's folder is; the runs lie beside it."""

    @property
    def search_file(self) -> Path:
        """What the search decided."""
        return self.path / RECORD

    def read(self) -> Record:
        """Read what was decided.

        Raises:
            InputError: It is not what a search writes.
        """
        return Record.from_json(read_json(self.search_file))

    def write(self, record: Record) -> None:
        """Write down what is decided, whole."""
        write_json(self.search_file, asdict(record))

    @staticmethod
    def _left_over(path: Path) -> bool:
        return RunFolder._left_over(path) or (path.name.startswith(f".{Path(RECORD).stem}.") and path.suffix == ".json")


def runs_of(out: Path, name: str) -> list[str]:
    """Return the names of the runs of a search for several budgets; none where there is no such search.

    Args:
        out: Folder that holds the runs.
        name: Of the search.
    """
    file = out / name / RECORD
    if not file.is_file():
        return []
    return [one.run for one in Record.from_json(read_json(file)).own if one.run is not None]
