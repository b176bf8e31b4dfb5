"""Parts of the measurements on a GPU: what is kept, what is tried again, and what a report shows."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import report
from benchmarks.hardware import on_gpu
from benchmarks.hardware.gpu_parts import MEASURES


class Setting:
    """A setting whose parts do nothing."""

    def __init__(self) -> None:
        self.exported: list[str] = []

    def key(self, part: str) -> str:
        return part


def test_what_failed_is_tried_again_and_what_is_known_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "cache_folder", lambda: tmp_path)
    ran: list[str] = []
    fails = {"step"}

    def part(name: str) -> Any:
        def run(setting: Any, seconds: float) -> dict[str, Any]:
            ran.append(name)
            return {"failed": "memory is full" if name in fails else "", "number": len(ran)}

        return run

    monkeypatch.setattr(on_gpu, "PARTS", {name: part(name) for name in ("weights", "step")})
    setting: Any = Setting()

    def called() -> dict[str, Any]:
        return on_gpu.found_of(["weights", "step"], setting, report.Kept("on-gpu", "x"), time.monotonic() + 1000)

    first = called()
    assert (first["weights"]["failed"], first["step"]["failed"]) == ("", "memory is full")
    fails.clear()
    second = called()
    assert second["step"]["failed"] == ""
    assert second["weights"] == first["weights"]
    assert called() == second
    assert ran == ["weights", "step", "step"]
    # A part for which no time is left is left to the next call.
    assert on_gpu.found_of(["tests"], setting, report.Kept("on-gpu", "x"), time.monotonic()) == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_part_gives_to_its_process_is_what_that_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, which no test has."""
    commands: list[list[str]] = []

    def run(command: list[str], seconds: float, *more: Any) -> tuple[str, str]:
        commands.append(command)
        return "", "not run"

    monkeypatch.setattr(on_gpu, "run", run)
    setting = on_gpu.Setting(device)
    for part in on_gpu.PARTS.values():
        assert part(setting, 100.0)["failed"]
    told = [
        command[command.index("--measure") + 1 :] for command in commands if "benchmarks.hardware.on_gpu" in command
    ]
    assert {name for name, *_ in told} == set(MEASURES)
    for name, on, options in told:
        assert on == device
        inspect.signature(MEASURES[name]).bind(on, **json.loads(options))


def test_a_command_that_takes_too_long_ends_with_what_it_has_started(tmp_path: Path) -> None:
    note = tmp_path / "child"
    script = f"sleep 600 & echo $! > {note}; wait"
    assert on_gpu.run(["bash", "-c", script], 5.0) == ("", "not done after 5 s")
    state = Path(f"/proc/{int(note.read_text())}/stat")
    deadline = time.monotonic() + 60  # a process that was killed ends when it has a core
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_part_has_a_limit_and_a_place_in_the_report() -> None:
    assert list(on_gpu.LIMITS) == list(on_gpu.PARTS)
    memory = {"failed": "", "predicted": 200, "held": 100}
    arm = {"failed": "", "what": "a cut", "tokens": 7_808_000, "nll": [2.5, 0.01], "accuracy": [0.5, 0.02]}
    text = "\n".join(
        on_gpu.sections(
            {
                "library": memory,
                "search": arm,
                "recipe": {"failed": "not done after 360 s"},
                "trainers": {"failed": "", "ours": 300.0, "theirs": 200.0, "step_tokens": 64},
                "serving": {"failed": "", "runtimes": {"vllm": {"predicted": 300, "held": 200}}},
            }
        )
    )
    for expected in (
        "| solving | 200 B | 100 B | 2.00 |",
        "| serving, vllm | 300 B | 200 B | 1.50 |",
        "| search | a cut | 7,808,000 | 100 | 2.5000 ± 0.0100 | 50.00 ± 2.00 |",
        "| recipe | failed: not done after 360 s |",
        "1.50 times as fast",
    ):
        assert expected in text
