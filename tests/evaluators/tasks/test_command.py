"""A command that scores the student: what it is given, what it may print, and every way in which it can fail."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autodistill.errors import InputError, TrialFailedError
from autodistill.evaluation.base import Subject
from autodistill.evaluators.tasks.command import parse_command
from autodistill.inference.packed_student import PackedStudent

SCORE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
scores = []
for line in open(sys.argv[2]):
    record = json.loads(line)
    ids = torch.tensor([record["tokens"]])
    with torch.no_grad():
        scores.append({"id": record["id"], "score": float(model(ids, labels=ids).loss)})
print(json.dumps(scores))
"""


def program(tmp_path: Path, source: str) -> str:
    path = tmp_path / "it's a program.py"
    path.write_text(source)
    return f"""{sys.executable} "{path}" {{student}} {{data}}"""


@pytest.mark.slow
def test_it_scores_the_students_own_weights_on_the_split(tmp_path: Path, subject: Subject) -> None:
    student = subject.student
    assert isinstance(student, PackedStudent)
    (found,) = parse_command(program(tmp_path, SCORE), "min").evaluate(subject)
    import torch

    ids = torch.tensor(student.data.tokens.astype(np.int64))
    with torch.no_grad():
        expected = [float(student.model(row[None], labels=row[None]).loss) for row in ids]
    assert found.value == pytest.approx(np.mean(expected), rel=1e-5)
    assert found.stderr == pytest.approx(np.std(expected, ddof=1) / len(expected) ** 0.5, rel=1e-5)
    assert (found.name, found.direction, found.detail["examples"]) == ("command", "min", 6)


def test_a_worker_runs_it_where_it_was_typed(tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may run in another folder, as on somebody else's cluster.

    Without the folder where it was typed, commands that are found by name still run.
    """
    (tmp_path / "score.py").write_text("print(open('scores.json').read())")
    (tmp_path / "scores.json").write_text("[0.25, 0.75]")
    monkeypatch.chdir(tmp_path)
    relative = parse_command(f"{sys.executable} score.py {{student}}")
    named = parse_command(f"{sys.executable} -c 'print([0.5] * 2); {'#' * 300}' {{student}}")
    assert relative.files == (Path(sys.executable), tmp_path / "score.py")
    assert named.files == (Path(sys.executable),)
    monkeypatch.chdir("/")
    (found,) = relative.evaluate(subject)
    assert found.value == 0.5
    (found,) = replace(named, folder=tmp_path / "gone").evaluate(subject)
    assert found.value == 0.5


def test_words_are_never_run_by_a_shell(tmp_path: Path, subject: Subject) -> None:
    source = "import json, sys; print(json.dumps([len(sys.argv[1]), len(sys.argv) == 5 and sys.argv[4] == '$(x);|'] ))"
    with pytest.raises(TrialFailedError, match="item 1"):  # true is not a number
        parse_command(program(tmp_path, source) + " '$(x);|'").evaluate(subject)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("print('[1, NaN]')", "item 1 of what it printed is no finite number"),
        ("print('[1, Infinity]')", "item 1"),
        ("print('[1, \"a\"]')", "item 1"),
        ("print('[1, null]')", "item 1"),
        ("print('[{\"id\": 1}]')", "item 0"),
        ('print(\'[{"id": [], "score": 1}]\')', "item 0"),
        ("print('[]')", "no list of scores"),
        ("print('{}')", "no list of scores"),
        ("print('0.5')", "no list of scores"),
        ("print('score: 3')", "not JSON .*score: 3"),
        ("", "not JSON"),
        ("import sys; print('no such file', file=sys.stderr); sys.exit(3)", "ended with 3: no such file"),
        ("import os; os.kill(os.getpid(), 9)", "ended with -9"),
    ],
)
def test_what_goes_wrong_fails_the_trial(tmp_path: Path, subject: Subject, source: str, message: str) -> None:
    with pytest.raises(TrialFailedError, match=message) as caught:
        parse_command(program(tmp_path, source)).evaluate(subject)
    assert caught.value.cause == "command"
    assert "\n" not in str(caught.value)


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path, subject: Subject) -> None:
    note = tmp_path / "child"
    shell = f"sleep 600 & echo $! > {note}; sleep 600; : {{student}}"
    with pytest.raises(TrialFailedError, match="did not end within"):
        parse_command(f"sh -c {shlex.quote(shell)}", seconds=2.0).evaluate(subject)
    check_ended(int(note.read_text()))


@pytest.mark.parametrize(("output", "outcome"), [("&", "did not end within"), ("> /dev/null 2>&1 &", None)])
def test_what_a_command_started_ends_where_it_has_ended_itself(
    tmp_path: Path, subject: Subject, output: str, outcome: str | None
) -> None:
    """This holds whether or not the child keeps open the command's output, for which the evaluator waits."""
    note = tmp_path / "child"
    shell = f"sleep 600 {output} echo $! > {note}; echo [0.5]; : {{student}}"
    command = parse_command(f"sh -c {shlex.quote(shell)}", seconds=2.0)
    if outcome is None:
        assert command.evaluate(subject)[0].value == 0.5
    else:
        with pytest.raises(TrialFailedError, match=outcome):
            command.evaluate(subject)
    check_ended(int(note.read_text()))


def check_ended(process: int) -> None:
    for _ in range(200):
        if not Path(f"/proc/{process}").exists() or "Z" in Path(f"/proc/{process}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    os.kill(process, 9)
    pytest.fail("what the command started is still there")


def test_scores_of_the_same_id_share_a_document(tmp_path: Path, subject: Subject) -> None:
    printed = json.dumps([{"id": name, "score": score} for name, score in (("a", 1), ("a", 2), ("b", 6))])
    (found,) = parse_command(program(tmp_path, f"print('''{printed}''')")).evaluate(subject)
    assert found.value == 3
    assert found.documents == {"ids": [0, 1], "count": [2, 1], "sum": [3.0, 6.0]}


@pytest.mark.parametrize(
    ("expected", "due"),
    [
        (None, None),
        ((6, 3), None),  # as many scores as examples
        ((6, 4), 4),
        ((9, 9), 6),  # a score for each example, and there are 6 now
        ((9, 4), None),  # nothing is known if there are fewer examples
    ],
)
def test_scores_are_as_many_as_for_the_teacher(
    tmp_path: Path, subject: Subject, expected: tuple[int, int] | None, due: int | None
) -> None:
    command = replace(parse_command(program(tmp_path, "print([1, 2, 3])")), expected=expected)
    if due is None:
        assert command.evaluate(subject)[0].value == 2
    else:
        with pytest.raises(TrialFailedError, match=f"3 scores, and {due} are due"):
            command.evaluate(subject)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no program ''"),
        ("no-such-program-here {student}", "no program 'no-such-program-here'"),
        ("python3 'x", "cannot be read"),
        (f"{sys.executable} x.py", "never names {student}"),
    ],
)
def test_what_cannot_work_is_refused_before(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_command(text)
