"""What the steps at the end of a search share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from autodistill.checksums import LIST
from autodistill.distillation.models import load_model
from autodistill.distillation.teacher import Teacher
from autodistill.errors import DamagedError
from autodistill.moments import now
from autodistill.records.row import Row
from autodistill.records.store import RunFolder
from autodistill.search.trials import Question
from autodistill.students import has_student, kept_after, listed, trained_student
from autodistill.token_sets import Prepared
from autodistill.trial_data import TrialSetting


class Phases(Protocol):
    """Times the phases of a search."""

    def phase(self, name: str, shown: str) -> AbstractContextManager[None]:
        """Times the block."""
        ...


@dataclass(frozen=True, kw_only=True)
class Finisher:
    """Everything that the steps of the end share."""

    question: Question
    setting: TrialSetting
    run: RunFolder
    teacher: Teacher
    data: Prepared
    threads: int
    phases: Phases
    line: Callable[[str], None]
    _students: dict[tuple[str, int | None], Path] = field(default_factory=dict, init=False, repr=False)

    def student(self, row: Row) -> Path:
        """Folder of the float32 student of a row, whose files are held to their checksums once.

        Raises:
            DamagedError: They are not as they were written.
        """
        key = row.trial, kept_after(row)
        if key not in self._students:
            known = listed(self.run.events.read()).get(key)
            folder = trained_student(self.run.checkpoints / row.trial, self.setting.storage, key[1], known)
            if folder.is_dir() and not (folder / LIST).exists():
                self.line(f"the student of {row.trial} is taken as it lies there: an earlier version kept no checksums")
            self._students[key] = folder
        return self._students[key]

    def whole(self, row: Row) -> bool:
        """Whether a row's student is as it was written; says so where it is not."""
        try:
            self.student(row)
        except DamagedError as error:
            self.line(f"the student of {row.trial} is passed over: {error}")
            return False
        return True

    def has(self, row: Row) -> bool:
        """Whether its student was kept."""
        return has_student(self.run.checkpoints / row.trial, self.setting.storage, kept_after(row))

    def load(self, row: Row) -> Any:
        """The float32 student of a row."""
        return load_model(self.student(row), torch.float32, self.setting.device)

    def write(self, kind: str, row: Row) -> None:
        """Appends a row to the log."""
        self.run.events.append({"event": kind, "row": row.to_json(), "time": now()})
