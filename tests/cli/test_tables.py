"""Plain lines without control codes, a live view on a real terminal, and the table's columns."""

import contextlib
import io
import os
import pty
import re
from typing import Any

import pytest
from rich.console import Console

from autodistill.cli.tables import LiveView, Progress, View, leaderboard_table, open_view
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Temperature
from autodistill.strategy.strategy import Finishing, Strategy

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
PROGRESS = Progress(
    phase="trials",
    planned=12,
    done=5,
    running=2,
    paused=4,
    stopped=3,
    rejected=1,
    best=0.4123,
    baseline=0.39,
    teacher=0.455,
    tokens_per_second=1812.4,
    seconds_left=252.0,
)
LINE = (
    "trials: 5 of 12 done, 2 running, 4 paused, 3 stopped, 1 rejected, 0 failed; "
    "accuracy: best 0.4123, baseline 0.3900, teacher 0.4550; 1,812 tokens/s, 4m 12s left\n"
)


def changed(**fields: Any) -> Progress:
    return Progress(**{**vars(PROGRESS), **fields})


def test_a_stream_that_is_no_terminal_gets_plain_lines() -> None:
    stream = io.StringIO()
    with open_view(stream, {"TERM": "xterm"}) as view:
        view.update(PROGRESS)
        view.log("worker \x1b[31mred\x1b[0m\r\nnext\x07")
    assert stream.getvalue() == LINE + "worker  [31mred [0m next \n"
    assert not CONTROL.search(stream.getvalue())


def test_only_changes_print_at_once() -> None:
    now = [0.0]
    stream = io.StringIO()
    view = View(stream, interval=5.0, clock=lambda: now[0])
    updates = [
        (0.0, changed(), True),
        (1.0, changed(tokens_per_second=1.0, running=1, seconds_left=9.0), False),
        (2.0, changed(done=6), True),
        (3.0, changed(done=6, best=0.42), True),
        (7.9, changed(done=6, best=0.42, seconds_left=1.0), False),
        (8.0, changed(done=6, best=0.42, seconds_left=1.0), True),
        (8.1, changed(done=6, best=0.42, phase="export"), True),
    ]
    for when, progress, printed in updates:
        now[0] = when
        before = len(stream.getvalue().splitlines())
        view.update(progress)
        assert len(stream.getvalue().splitlines()) - before == printed, when


def test_time_that_is_over_is_told_as_such() -> None:
    assert [changed(tokens_per_second=None, seconds_left=left).speed() for left in (0.2, 61.0, -0.2, -605.0)] == [
        "1.0s left",
        "1m 01s left",
        "1.0s over the planned time",
        "10m 05s over the planned time",
    ]


def test_what_is_not_known_is_not_said() -> None:
    stream = io.StringIO()
    View(stream).update(Progress(phase="loading the teacher"))
    assert stream.getvalue() == "loading the teacher\n"


def on_terminal(environ: dict[str, str]) -> tuple[type[View], str]:
    """Return a view's class, and what it writes to a pseudo-terminal."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        with open_view(stream, environ) as view:
            view.update(PROGRESS)
            view.log("[bold]a name\x1b[2J")
        stream.flush()
        os.set_blocking(master, False)
        data = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                data += os.read(master, 1 << 16)
    os.close(master)
    return type(view), data.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_a_terminal_that_wants_no_control_codes_gets_none(environ: dict[str, str]) -> None:
    kind, text = on_terminal(environ)
    assert kind is View
    assert text == LINE + "[bold]a name [2J\n"


def test_a_terminal_gets_the_live_view(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    kind, text = on_terminal({"TERM": "xterm"})
    assert kind is LiveView
    for words in ("5 of 12 done, 2 running", "best 0.4123", "1,812 tokens/s", "[bold]a name"):
        assert words in text
    assert "\x1b[2J" not in text
    assert capsys.readouterr().out == ""


def row(name: str, /, bits: int = 4, **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": name,
        "trial": name,
        "kind": "student",
        "name": name,
        "deployment": {"runtime": "vllm", "format": "compressed-tensors", "bits": bits, "group_size": 64},
        "status": "completed",
        "feasible": True,
        "fidelity": 1.0,
    }
    return Row.from_json(least | fields)


def test_the_table_fits_a_hundred_characters_and_its_columns_align() -> None:
    strategy = Strategy(
        distillation=Distillation(
            temperature=Temperature(shape="cosine", start=5.0, end=1.0),
            alignment=Alignment(layers="even", count=4, projection="low-rank", rank=8),
            attention=Attention(),
        ),
        finishing=Finishing(format="gguf-q4_0", bits=4, group_size=32),
    ).to_json()
    rows = [
        row(
            "t001",
            accuracy=0.4123,
            accuracy_stderr=0.0031,
            retention=0.982,
            memory_bytes=15_930_000_000,
            memory_source="predicted",
            size_bytes=98_300_000,
            latency_ms=12.34,
            latency_source="measured",
            strategy=strategy,
        ),
        row("teacher-ct-int8-g64", kind="teacher", bits=8, accuracy=0.4123),
        row("t002", accuracy=0.5, feasible=False, memory_bytes=10**10),
    ]
    text = leaderboard_table(rank(rows))
    assert max(map(len, text.splitlines())) <= 100
    table, strategies = text.split("\n\n")
    head, *lines = table.splitlines()
    assert head.split() == ["#", "row", "accuracy", "retention", "memory", "size", "latency", "trained"]
    assert [line.split()[:2] for line in lines[:3]] == [
        ["1=", rows[0].short_id],
        ["2=", rows[1].short_id],
        ["3!", rows[2].short_id],
    ]
    assert re.search(r"0\.4123 ± 0\.0031 +98\.2% +~15\.9 GB +98\.3 MB +12\.3ms +1x$", lines[0])
    for note in (
        "tied",
        "~ predicted",
        "! over the budget",
        "retention: share of the teacher's accuracy",
        "trained: 1x",
    ):
        assert note in re.sub(r"\s+", " ", " ".join(lines[3:]))
    assert " ".join(strategies.split()) == (
        "t001: 80% even, KD 0.50 T5>1 cosine, lr 0.0003, even-4 low-rank x1 rank 8, attention maps x1, QAT gguf-q4_0"
    )


def test_the_strategies_of_a_leaderboard_are_told_once() -> None:
    strategy = Strategy().to_json()
    rows = [
        row("t001", name="80% even, KD 0.50 T1", strategy=strategy, accuracy=0.3),
        row("t001", name="80% even, KD 0.50 T1", strategy=strategy, accuracy=0.29, bits=8),
        row("b000", kind="baseline", name="logit_kd", strategy=strategy, accuracy=0.2),
        row("t001s1", kind="confirmation", name="80% even, KD 0.50 T1", strategy=strategy, accuracy=0.1),
    ]
    lines = leaderboard_table(rank(rows)).split("\n\n")[1].splitlines()
    assert [line.split(": 80% even")[0] for line in lines] == ["t001, t001s1", "b000 logit_kd"]
    assert all(line.count("80%") == 1 for line in lines)
    assert len(leaderboard_table(rank(rows), legend=1).split("\n\n")[1].splitlines()) == 1


def test_strategies_stand_in_the_order_of_their_best_rows() -> None:
    strategy = Strategy().to_json()
    rows = [
        row("t001", strategy=strategy, accuracy=0.3),
        row("b000", kind="baseline", name="logit_kd", strategy=strategy, accuracy=0.2),
        row("t001", strategy=strategy, accuracy=0.1, bits=8),
    ]
    told = leaderboard_table(rank(rows), legend=1).split("\n\n")[1]
    assert told.startswith("t001: ")


def test_a_student_as_it_begins_is_not_said_to_be_trained() -> None:
    rows = [
        row("t001", strategy=Strategy().to_json(), accuracy=0.3, fidelity=4.0),
        row("solved", kind="initial", name="solved, untrained", strategy=Strategy().to_json(), accuracy=0.2),
    ]
    table, told = leaderboard_table(rank(rows)).split("\n\n")
    assert [line.split()[-1] for line in table.splitlines()[1:3]] == ["4x", "-"]
    assert told.splitlines()[1] == "solved: 80% even, untrained"


def test_a_row_that_was_not_trained_to_the_end_is_said_to_stand_last() -> None:
    short = row("t001", strategy=Strategy().to_json(), accuracy=0.3, fidelity=0.5)
    teacher = row("teacher", kind="teacher", accuracy=0.2)
    assert "less training than that are listed last" in " ".join(leaderboard_table(rank([short, teacher])).split())
    assert "listed last" not in leaderboard_table(rank([teacher]))


def test_a_narrow_leaderboard_keeps_rows_figures_and_memory_whole() -> None:
    found = row(
        "t001x",
        accuracy=0.4123,
        accuracy_stderr=0.0031,
        retention=0.982,
        memory_bytes=15_930_000_000,
        size_bytes=98_300_000,
        latency_ms=12.34,
        strategy=Strategy().to_json(),
    )
    for width in (200, 100, 80, 60):
        text = leaderboard_table(rank([found]), width=width)
        assert max(map(len, text.splitlines())) <= width
        for cell in (found.short_id, "0.4123 ± 0.0031", "15.9 GB", "12.3ms", "lr", "0.0003"):
            assert cell in text


def test_an_empty_leaderboard_is_its_head() -> None:
    assert leaderboard_table([]).split() == ["#", "row", "accuracy", "retention", "memory", "size", "trained"]


def test_names_cannot_smuggle_control_codes_into_the_table() -> None:
    assert not CONTROL.search(leaderboard_table(rank([row("\x1b[31mred\r", accuracy=0.1)])))


def test_a_line_says_only_what_the_lines_before_have_not() -> None:
    stream = io.StringIO()
    view = View(stream)
    view.update(PROGRESS)
    view.update(changed(phase="export", tokens_per_second=None))
    view.update(changed(phase="export", tokens_per_second=None, best=0.42))
    assert stream.getvalue().splitlines()[1:] == [
        "export: 4m 12s left",
        "export: accuracy: best 0.4200, baseline 0.3900, teacher 0.4550; 4m 12s left",
    ]


def test_an_old_speed_is_not_said_again_while_one_trial_trains() -> None:
    stream = io.StringIO()
    view = View(stream, interval=0.0)
    for left in (252.0, 222.0, 192.0):
        view.update(changed(seconds_left=left))
    view.update(changed(seconds_left=162.0, tokens_per_second=2000.0))
    assert stream.getvalue() == LINE + "trials: 3m 42s left\ntrials: 3m 12s left\ntrials: 2,000 tokens/s, 2m 42s left\n"


def test_the_time_left_runs_down_between_two_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    view = LiveView(stream)
    now = [100.0]
    monkeypatch.setattr(view, "_clock", lambda: now[0])
    view.update(PROGRESS)
    now[0] += 12
    drawn = Console(file=stream, width=100)
    drawn.print(view._draw())
    assert "4m 00s left" in stream.getvalue()
