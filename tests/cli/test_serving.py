"""The commands of a service as a user types them: exit codes, lines, and what goes to stdout."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autodistill.advisor.describe import deployment_named
from autodistill.cli.app import main
from autodistill.cli.serving import BROKEN, loaded_text, report_facts, report_line, report_table, served_text
from autodistill.export.gguf import GgufExporter
from autodistill.service.launch import Service, settle
from autodistill.service.monitor import LimitCheck, Report
from autodistill.service.request import ServeRequest
from autodistill.service.window import Probe, Window
from autodistill.testing import save_tiny_teacher


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = save_tiny_teacher(tmp_path_factory.mktemp("teacher"), layers=2)
    return GgufExporter().export(teacher, deployment_named("gguf-q8_0"), tmp_path_factory.mktemp("gguf")).path


@pytest.fixture(scope="module")
def service(student: Path) -> Iterator[Service]:
    with Service(settle(ServeRequest(student, port=0, threads=1, context=256))) as running:
        yield running


def promise(folder: Path, student: Path, memory: int) -> Path:
    """Copy the student and write a record that promises this much memory."""
    folder.mkdir()
    (folder / student.name).write_bytes(student.read_bytes())
    stored = {"context": 256, "streams": 1, "memory_bytes": memory, "device": None, "latency": [], "measured": {}}
    (folder / "export.json").write_text(json.dumps({"row": "t001", "promise": stored}))
    return folder


def test_monitor_gives_lines_of_json_and_an_exit_code_by_the_promise(
    service: Service, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTODISTILL_API_KEY", service.setting.key)
    looks = ["monitor", service.setting.url, "--every", "200ms", "--window", "10s", "--time", "600ms"]
    kept = promise(tmp_path / "kept", student, 10**12)
    assert main([*looks, "--promise", str(kept), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines
    assert [one["verdict"] for one in lines] == ["OK"] * len(lines)
    assert lines[-1]["token"]["count"] == 15 * len(lines)
    broken = promise(tmp_path / "broken", student, 10**3)
    assert main([*looks, "--promise", str(broken)]) == BROKEN == 4
    assert all(line.startswith("BROKEN by memory (") for line in capsys.readouterr().out.splitlines())
    assert main(looks) == 0
    # Without a promise nothing can be broken. An unreachable server is reported.
    assert main(["monitor", "http://127.0.0.1:9", "--time", "1ms", "--every", "1ms", "--window", "1s"]) == 0
    assert "cannot be reached" in capsys.readouterr().out


def test_monitor_serves_prometheus_meanwhile(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTODISTILL_API_KEY", service.setting.key)
    looks = ["monitor", service.setting.url, "--every", "100ms", "--window", "10s", "--time", "200ms"]
    assert main([*looks, "--prometheus", "0"]) == 0
    assert "for Prometheus: http://127.0.0.1:" in capsys.readouterr().err


def test_chat_reads_turns_from_a_pipe_and_writes_answers_alone_to_stdout(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\nnever\n"))
    assert main(["chat", str(student), "--max-tokens", "4", "--temperature", "0"]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("\n")
    assert f"{student.stem} at http://127.0.0.1:" in told.err


def test_load_prints_what_was_kept_and_where(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTODISTILL_API_KEY", service.setting.key)
    small = ["--prompt", "8", "--decoded", "2", "--time", "10s", "--runs", str(tmp_path), "--threads", "1"]
    assert main(["load", service.setting.url, "--streams", "1,2", *small]) == 0
    assert "with 2 at once, the most tried" in capsys.readouterr().out
    assert main(["load", service.setting.url, "--streams", "1", "--latency", "1us", *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["streams"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "gone.gguf"], "there is no gone.gguf"),
        (["serve", "STUDENT", "--context", "100000"], "give --context"),
        (["serve", "STUDENT", "--draft", "gone.gguf"], "there is no gone.gguf"),
        (["chat", "http://127.0.0.1:9"], "cannot be reached"),
        (["chat", "ftp://x"], "is no address of a server"),
        (["chat", "http://127.0.0.1:9", "--temperature", "nan"], "--temperature must be 0 to 100"),
        (["monitor", "nowhere"], "is no address of a server"),
        (["monitor", "http://127.0.0.1:9", "--window", "1s"], "--window"),
        (["monitor", "http://127.0.0.1:9", "--promise", "STUDENT"], "promises nothing"),
        (["monitor", "http://127.0.0.1:9", "--key-file", "gone"], "there is no gone"),
        (["load", "http://127.0.0.1:9", "--streams", "0"], "--streams"),
        (["load", "http://127.0.0.1:9", "--margin", "0.5"], "--margin applies to a promise"),
        (["monitor", "http://127.0.0.1:9", "--margin", "0.5"], "--margin applies to a promise"),
        (["monitor", "http://127.0.0.1:9", "--prometheus", "99999"], "--prometheus must be 0 to 65535"),
        (["monitor", f"http://{'x' * 70}:9"], "is no address of a server"),
        (["serve", "STUDENT", "--host", "/tmp"], "ends in .sock"),
        (["serve", "STUDENT", "--host", "x" * 70, "--public", "--key-file", "key"], "is no address"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str],
    said: str,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([str(student) if word == "STUDENT" else word for word in words])
    lines = capsys.readouterr().err.splitlines()
    assert code in (1, 2)
    assert lines[-1].startswith("error: ")
    assert said in lines[-1]


def report(*judged: LimitCheck, up: bool = True) -> Report:
    window = Window(60.0)
    for at in range(3):
        window.add(
            Probe(
                at=float(at),
                first_seconds=0.08,
                token_seconds=(0.01,) * 15,
                answer_tokens=16.0 * at,
                running=2.0,
                waiting=0.0,
                memory_bytes=210_000_000,
                acceptance=0.75,
            )
        )
    probe = Probe(at=3.0, failed=not up)
    return Report(
        at=3.0,
        up=up,
        why="" if up else "it \x1b[2Jbroke off",
        runtime="llama.cpp",
        last=probe,
        figures=window.figures(),
        judged=judged,
    )


def test_a_report_is_shown_as_a_line_and_as_a_table() -> None:
    from rich.console import Console

    plain = report_line(report())
    for part in ("first token mean 80.0ms, p50 80.0ms", "16 tokens/s", "memory 210 MB", "2 answered, 0 waiting", "75%"):
        assert part in plain
    broken = LimitCheck(figure="tpot_p95", kept=False, value=0.01, most=0.005, comparison="10.0ms of 5.0ms")
    kept = LimitCheck(figure="memory", kept=True, value=1.0, most=2.0, comparison="1 B of 2 B")
    said = report_line(report(broken, kept))
    assert said.startswith("BROKEN by tpot_p95 (10.0ms of 5.0ms); server llama.cpp, up")
    out = io.StringIO()
    Console(file=out, width=100).print(report_table(report(broken, kept)))
    assert "tpot_p95   BROKEN: 10.0ms of 5.0ms" in out.getvalue()
    assert "\x1b" not in report_facts(report(up=False))["server"]


def test_what_a_server_and_a_load_came_to_is_told() -> None:
    done = {"url": "http://x", "seconds": 75.0, "restarts": 2, "prompt_tokens": 1200, "answer_tokens": 34}
    assert served_text(done) == (
        "http://x is stopped after 1m 15s: 1,200 tokens read, 34 written, started again 2 times"
    )
    drafted = served_text(done | {"restarts": 0, "drafted": 40, "accepted": 30, "acceptance": 0.75})
    assert drafted.endswith("30 of 40 drafted tokens accepted (75%)")
    assert served_text({"url": "http://x", "restarts": 0}) == "http://x is stopped"
    levels = [{"broken": []}, {"broken": ["tpot_p95"]}]
    measured = {"doubts": ["other work took 1.0 of 2 cores"]}
    load = {"levels": levels, "streams": 4, "capacity": 2.0, "measured": measured, "kept_in": "m.jsonl"}
    told = loaded_text(load | {"promise": None})
    assert told == (
        "It keeps to the limits with 4 at once: 2 answers/s.\nStored in m.jsonl.\n"
        "Doubtful: other work took 1.0 of 2 cores."
    )
    # If no limit was met, there may be none. Limits are not mentioned next to a broken promise.
    told = loaded_text(load | {"levels": levels[:1], "promise": None})
    assert told.startswith("It gives 2 answers/s with 4 at once, the most tried.")
