"""The user's own metric: a command scores the student's folder and prints a score for each example as JSON."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.errors import InputError, TrialFailedError
from autodistill.evaluation.base import Direction, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.evaluators.tasks.scoring import asked
from autodistill.strategy.deployment import Deployment

NAME = "command"
_STUDENT, _DATA = "{student}", "{data}"
_SHOWN = 300  # characters of a command's output that messages show


def parse_command(text: str, direction: Direction = "max", seconds: float = 600.0, folder: str = "") -> Command:
    """Return the evaluator of a command line. It is split like in a shell, but no shell runs it.

    Args:
        text, direction, seconds: See `Command`.
        folder: The folder in which it was typed. By default the working folder.

    Raises:
        InputError: Quotes are unbalanced, no program of that name exists, or `{student}` is missing.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"the metric command cannot be read ({error}): quote it as in a shell") from error
    program = os.path.expanduser(words[0]) if words else ""
    if shutil.which(os.path.join(folder, program) if os.sep in program else program) is None:
        where = f" in {folder}" if folder else ""
        raise InputError(
            f"the metric command has no program {words[0] if words else ''!r}{where}: give --metric-command with one "
            "that can be run"
        )
    if not any(_STUDENT in word for word in words):
        raise InputError(f"the metric command never names {_STUDENT}, the folder of the student to be scored")
    words[0] = program
    return Command(words=tuple(words), folder=Path(folder or Path.cwd()), direction=direction, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Measures "command", the mean of the scores that a command prints.

    In the command's words, `{student}` becomes a temporary folder with the packed and dequantised student, which
    transformers can load. `{data}` becomes a JSONL file of the split, with `id`, and either `prompt` and `answer` of
    each question or `text` and `tokens` of each sequence. The command prints JSON on stdout: a list of numbers, or of
    objects with `id` and `score`. Scores of the same id belong to one document. If the command fails, its stderr is
    shown.

    Attributes:
        words: The words of the command.
        folder: The working directory in which it was typed and is run. A machine without this folder runs it anyway,
            with programs found by name.
        direction: Whether a higher or a lower score is better.
        seconds: After this time the command and all processes that it started are killed.
        expected: For the teacher, the number of examples given and of scores printed, or None until it is known. For as
            many examples, the command must print as many scores again. If it scored each example, it must always do so.
            Otherwise trials could not be compared.
    """

    words: tuple[str, ...]
    folder: Path
    direction: Direction = "max"
    seconds: float = 600.0
    expected: tuple[int, int] | None = None
    name: str = NAME
    needs: Needs = "student"
    measures: Mapping[str, Quantity] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "measures", {NAME: Quantity("score", self.direction)})

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that its words name. Each machine that runs it must have them."""
        # os.path accepts words as paths for which pathlib raises, for example a program's text.
        return tuple(self.folder / word for word in self.words if os.path.isfile(self.folder / word))

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Run the command.

        Raises:
            TrialFailedError: It failed, took too long, or printed something else. The message quotes its output.
        """
        student = asked(subject, NAME)
        with tempfile.TemporaryDirectory(prefix="autodistill-command-") as temporary:
            folder, data = Path(temporary) / "student", Path(temporary) / "data.jsonl"
            student.save(folder)
            lines = [json.dumps(example) + "\n" for example in student.examples()]
            data.write_text("".join(lines), encoding="utf-8")
            filled = [word.replace(_STUDENT, str(folder)).replace(_DATA, str(data)) for word in self.words]
            printed = _run(filled, self.folder, self.seconds)
        ids, scores = _scores(printed)
        given, printed_before = self.expected or (len(lines), scores.size)
        due = printed_before if given == len(lines) else len(lines)
        if scores.size != due and (given == len(lines) or given == printed_before):
            raise TrialFailedError("command", f"it printed {scores.size} scores, and {due} are due as for the teacher")
        value, stderr = clustered_mean(scores, ids)
        return (
            Measurement(
                name=NAME,
                value=value,
                unit="score",
                direction=self.direction,
                source="simulated",
                stderr=stderr,
                detail={"split": student.split, "examples": scores.size, "command": shlex.join(self.words)},
                documents=per_document(scores, ids),
            ),
        )

    def supports(self, deployment: Deployment) -> bool:
        """Return True: every deployment can be simulated."""
        return True


def _run(words: Sequence[str], folder: Path, seconds: float) -> str:
    """Run the command and return what it prints. It runs in its own process group, which is killed at its end."""
    try:
        process = subprocess.Popen(
            words,
            cwd=folder if folder.is_dir() else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise TrialFailedError("command", f"{words[0]} could not be started: {error.strerror}") from error
    with process:
        try:
            out, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise TrialFailedError("command", f"it did not end within {seconds:g} seconds") from error
        finally:
            # The group is killed even if the command has ended, because processes that it started may still run.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise TrialFailedError("command", f"it ended with {process.returncode}: {_last(said) or _last(out)}")
    return out


def _last(text: str) -> str:
    return " ".join(text.split())[-_SHOWN:]


def _scores(printed: str) -> tuple[Any, Any]:
    """Return the ids, int32 [n], and the scores, float64 [n], in the order in which they were printed."""
    try:
        found = json.loads(printed)
    except (ValueError, RecursionError) as error:
        raise TrialFailedError("command", f"what it printed is not JSON ({error}): {_last(printed)}") from error
    if not isinstance(found, list) or not found:
        raise TrialFailedError("command", f"it printed no list of scores: {_last(printed)}")
    numbers: dict[Any, int] = {}
    ids, scores = [], []
    for place, item in enumerate(found):
        name, score = (item.get("id", place), item.get("score")) if isinstance(item, dict) else (place, item)
        plain = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not plain or not isinstance(name, str | int):
            raise TrialFailedError(
                "command",
                f'item {place} of what it printed is no finite number, nor {{"id", "score"}}: {item!r}'[:_SHOWN],
            )
        ids.append(numbers.setdefault(name, len(numbers)))
        scores.append(float(score))  # type: ignore[arg-type]
    return np.array(ids, dtype=np.int32), np.array(scores)
