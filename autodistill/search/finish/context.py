"""Objects and helpers that the steps at the end of a search share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from autodistill.data.dataset import Prepared
from autodistill.data.documents import DataSource
from autodistill.distillation.student.build import save_student
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.errors import DamagedError
from autodistill.export.base import Artifact, Ran
from autodistill.export.verify import Verification
from autodistill.inference.tensor_parallel import load_teacher
from autodistill.models.loading import load_model
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import write_scales
from autodistill.runs.events import RowAdded, RowTested
from autodistill.runs.results.beginnings import trained_row, trained_trial
from autodistill.runs.results.leaderboard import UNTRAINED
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.students import has_student, kept_after, listed, trained_student
from autodistill.search.campaign.state import Question
from autodistill.search.worker.begin import begun
from autodistill.search.worker.interpolated import interpolated
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.strategy import Strategy
from autodistill.utils.checksums import LIST, write_list


class Phases(Protocol):
    """Times the phases of a search."""

    def phase(self, name: str, message: str) -> AbstractContextManager[None]:
        """Time the block."""
        ...


class Packed(NamedTuple):
    """The row that was packed last in a container: its files, their comparison with its weights, and their run."""

    row: str
    artifact: Artifact
    weights: Verification
    ran: Ran


@dataclass(frozen=True, kw_only=True)
class Finisher:
    """Everything that the final steps share.

    Attributes:
        general: General text that is not trained on. It shows what students forgot.
        trained_text: Fingerprint of the text that is trained on.
        packed: The row whose files lie in the folder of each container.
    """

    question: Question
    setting: TrialSetting
    run: RunFolder
    teacher: Teacher
    data: Prepared
    threads: int
    phases: Phases
    line: Callable[[str], None]
    general: DataSource
    trained_text: str
    packed: dict[str, Packed] = field(default_factory=dict, init=False, repr=False)
    _students: dict[tuple[str, int | None], Path] = field(default_factory=dict, init=False, repr=False)

    def student(self, row: Row) -> Path:
        """Return the folder of a row's model: the teacher's own, or a student's.

        A missing untrained or interpolated student is made again. The files of a student are compared with their
        checksums once.

        Raises:
            DamagedError: The files are not as they were written.
        """
        if row.kind == "teacher":
            return self.teacher.folder
        key = row.trial, kept_after(row)
        if key not in self._students:
            known = listed(self.run.events.all()).get(key)
            folder = trained_student(self.run.checkpoints / row.trial, self.setting.storage, key[1], known)
            if not folder.is_dir() and row.interpolation is not None:
                self._interpolate(row, folder)
            elif not folder.is_dir() and row.kind == "initial":
                self._begin(row, folder)
            elif folder.is_dir() and not (folder / LIST).exists():
                self.line(f"the student of {row.trial} is used without a check: an earlier version kept no checksums")
            self._students[key] = folder
        return self._students[key]

    def _begin(self, row: Row, folder: Path) -> None:
        """Write an untrained student."""
        assert row.strategy is not None
        self._write(*begun(self.setting, row.strategy, row.seed or 0), row.strategy, folder)

    def _interpolate(self, row: Row, folder: Path) -> None:
        """Write a student interpolated between its beginning and the trained student."""
        assert row.strategy is not None
        assert row.interpolation is not None
        trained = self.student(trained_row(row))
        made = interpolated(self.setting, row.strategy, row.seed or 0, trained, row.interpolation)
        self._write(*made, row.strategy, folder)

    def _write(self, model: Any, scales: Mapping[str, Scales], strategy: Strategy, folder: Path) -> None:
        """Write a student that no worker trained, atomically."""
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_student(model, self.setting.text(strategy.init), partial)
        if strategy.finishing is not None:
            write_scales(partial, strategy.finishing, scales)
        write_list(partial)
        os.replace(partial, folder)

    def spec(self, strategy: Strategy | None) -> ModelSpec:
        """Return the shape of a strategy's student, or the teacher's if the strategy is None."""
        if strategy is None:
            return self.setting.teacher_spec
        pretrained = self.setting.pretrained.get(strategy.init.model)
        return student_spec(strategy, self.setting.teacher_spec, pretrained)

    def whole(self, row: Row) -> bool:
        """Return whether a row's student is undamaged, and report it if not."""
        try:
            self.student(row)
        except DamagedError as error:
            self.line(f"the student of {row.trial} is passed over: {error}")
            return False
        return True

    def has(self, row: Row) -> bool:
        """Return whether a row's model is available. A trained student may not have been kept."""
        if row.kind in UNTRAINED:
            return True
        # A missing interpolated student can be made from the trained one.
        known = {row.trial, trained_trial(row)}
        return any(has_student(self.run.checkpoints / one, self.setting.storage, kept_after(row)) for one in known)

    def load(self, row: Row) -> Any:
        """Load a row's model: a student in float32, the teacher in the type that it is held in."""
        if row.kind == "teacher":
            return load_teacher(self.teacher.folder, self.setting.held_type, self.setting.device, self.setting.divided)
        return load_model(self.student(row), torch.float32, self.setting.device)

    def write(self, row: Row) -> None:
        """Append a row to the log."""
        self.run.events.add(RowTested(row=row) if row.split == "test" else RowAdded(row=row))
