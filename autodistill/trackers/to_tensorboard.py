"""Write trials as event files, which TensorBoard shows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.trackers.base import Tracker
from autodistill.trackers.trials import Point, TrackedTrial, identity_of
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import unwritable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_OWN = "events.out.tfevents.*"
_WHOSE = "autodistill-run.txt"


class TensorBoardTracker(Tracker):
    """Writes `DIR/RUN/TRIAL/events.out.tfevents...`, by default `tensorboard/TRIAL/` in the run's folder.

    Each session writes the files of a trial again from the log, since an event file cannot be continued.
    """

    def __init__(self, run: RunFolder, place: str | None) -> None:
        super().__init__(run, place)
        self._shown = run.path / "tensorboard" if place is None else Path(place).expanduser()
        self._folder = self._shown if place is None else self._shown / run.name
        self._writers: dict[str, SummaryWriter] = {}

    @classmethod
    def check(cls, place: str | None) -> None:
        """Refuse a place that is a file."""
        if place is not None and Path(place).expanduser().exists() and not Path(place).expanduser().is_dir():
            raise InputError(f"{place} is a file: name a folder, as in tensorboard=DIR")

    def send(self, trial: TrackedTrial, points: Sequence[Point], *, first: bool, last: bool) -> None:
        """Add scalars by tokens. At the end of the session, add the settings and figures of each trial that ended."""
        if not self._writers:
            self._take(self._folder)
        writer = self._writers.get(trial.trial)
        if writer is None or first:
            writer = self._new(self._folder / trial.trial)
            self._writers[trial.trial] = writer
            for name, text in {"name": trial.title, **trial.tags}.items():
                writer.add_text(name, text, 0, trial.began)
        for point in points:
            for name, value in point.values.items():
                writer.add_scalar(name, value, point.tokens, point.time, new_style=True)
        if last and trial.status is not None:
            self._end(writer, trial)
        writer.flush()

    def _end(self, writer: SummaryWriter, trial: TrackedTrial) -> None:
        from torch.utils.tensorboard.summary import hparams

        step = trial.points[-1].tokens if trial.points else 0
        for name, value in trial.final.items():
            writer.add_scalar(name, value, step, trial.ended, new_style=True)
        for summary in hparams(dict(trial.params), dict(trial.final)):
            writer._get_file_writer().add_summary(summary, step, trial.ended)
        writer.add_text("status", f"{trial.status} {trial.tags.get('reason', '')}".strip(), step, trial.ended)

    def _take(self, folder: Path) -> None:
        """Claim the folder of the run. It is refused if another run of the same name has written there."""
        mark, mine = folder / _WHOSE, identity_of(self.run)
        try:
            make_folder(folder)
            whose = mark.read_text(encoding="utf-8").strip() if mark.exists() else mine
            mark.write_text(mine + "\n", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise unwritable(
                folder, error if isinstance(error, OSError) else OSError(str(error)), "--log or --to"
            ) from error
        if whose != mine:
            mark.write_text(whose + "\n", encoding="utf-8")
            raise InputError(
                f"{folder} has the trials of another run of this name: name another folder, tensorboard=DIR"
            )

    def _new(self, folder: Path) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        try:
            make_folder(folder)
            for path in folder.glob(_OWN):
                path.unlink()
        except OSError as error:
            raise unwritable(folder, error, "--log or --to") from error
        return SummaryWriter(str(folder), max_queue=1000)

    @property
    def opened_by(self) -> str:
        """The command that shows the files."""
        return shlex.join(["tensorboard", "--logdir", str(self._shown)])

    def close(self) -> None:
        """Write what is still held in memory."""
        for writer in self._writers.values():
            writer.close()
