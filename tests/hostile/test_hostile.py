"""Hostile inputs end with their exit code and one line. Here some of each area run; `make hostile` runs all."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common import program
from benchmarks.common import report as reports
from tests.hostile import server as forking
from tests.hostile.__main__ import counts, faults, known, part_of, report, runs_fresh
from tests.hostile.cases import Case, Kit, all_cases, areas
from tests.hostile.server import Ending, Server

_OF_EACH = 1
_AREAS = sorted(areas())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


def _check(cases: list[Case], server: Server, folder: Path) -> None:
    found = faults(cases, server, folder)
    print(counts(cases))
    assert not found, "\n".join(f"{case}: {fault}" for case, fault in found.items())


@pytest.mark.parametrize("area", _AREAS)
def test_a_hostile_input_of_each_area_ends_in_one_line(area: str, kit: Kit, server: Server, tmp_path: Path) -> None:
    # Cases for which a search would measure this machine take seconds each.
    cheap = [case for case in all_cases(kit, only=(area,)) if not case.slow]
    _check(random.Random(area).sample(cheap, min(_OF_EACH, len(cheap))), server, tmp_path)


def test_a_share_of_the_inputs_runs_in_a_process_that_begins_with_nothing(server: Server, tmp_path: Path) -> None:
    """Both ways must end in the same way. A case that ends differently in a separate process is reported."""
    names = (Case(area="a", name=str(number), argv=("spaces", "--", f"no-{number}")) for number in itertools.count())
    chosen = next(case for case in names if runs_fresh(case))
    asked: list[bool] = []

    class Other(Server):
        def run(self, case: Case, folder: Path, fresh: bool = False) -> Ending:
            asked.append(fresh)
            ended = server.run(case, folder, fresh)
            return replace(ended, code=3) if fresh and case.codes != (2,) else ended

    other = Other()
    assert faults([chosen], other, tmp_path) == {}
    assert asked == [False, True]
    either = replace(chosen, codes=(2, 3))
    assert faults([either], other, tmp_path) == {either: "in a fresh process: exit code 3, where a fork ends with 2"}
    assert not runs_fresh(replace(chosen, argv=("spaces", "a\0b")))


def test_a_case_makes_the_same_files_whenever_and_in_whatever_order_it_runs(kit: Kit, tmp_path: Path) -> None:
    cases = [
        case for case in all_cases(kit, only=("gguf",)) if case.name.startswith(("tensor", "token", "flip", "cut"))
    ]
    chosen = random.Random(0).sample(cases, 30)
    made: list[dict[str, bytes]] = []
    for order in (chosen, chosen[::-1]):
        files = {}
        for case in order:
            folder = tmp_path / f"{len(made)}-{case.name}"
            folder.mkdir()
            case.make(folder)
            files[case.name] = (folder / "m.gguf").read_bytes()
        made.append(files)
    assert made[0] == made[1]
    assert len(set(made[0].values())) > 15


def test_parts_have_each_input_once() -> None:
    cases = [Case(area="a", name=str(number), argv=("estimate",)) for number in range(10)]
    parts = [part_of(cases, f"{first}/3") for first in (1, 2, 3)]
    assert sorted(int(case.name) for part in parts for case in part) == [*range(10)]
    for text in ("0/3", "4/3", "1", "x/2", "1/0"):
        with pytest.raises(argparse.ArgumentTypeError, match="--part is I/N"):
            part_of(cases, text)


def test_a_report_is_of_all_inputs_by_how_each_ended_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "REPORTS", tmp_path)
    monkeypatch.setattr(reports, "_NOTED", {})
    monkeypatch.setattr(reports, "_MADE", [])
    cases = [Case(area="gguf", name=name, argv=(verb,)) for name, verb in (("a", "estimate"), ("b", "x" * 99))]
    record = tmp_path / "record.jsonl"

    def ended(name: str, fault: str | None) -> None:
        with record.open("a") as file:
            line = {"case": f"gguf/{name}", "code": 2, "seconds": 0.5, "fault": fault, "fresh": name == "b"}
            file.write(json.dumps(line) + "\n")

    ended("a", "traceback: KeyError")
    with pytest.raises(SystemExit, match="lacks 1 of 2 cases, gguf/b for one"):
        report(cases, record)
    ended("b", None)
    ended("a", None)
    assert [line["fault"] for line in known(record)["gguf/a"]] == ["traceback: KeyError", None]
    text = report(cases, record).read_text()
    assert "**2 of 2 hostile inputs end as documented**" in text
    assert "1 of them did not when they were first tried" in text
    assert "and 1 of them, which their names choose, once more" in text
    assert "| gguf | 2 | 2 with 2 | 0 |" in text
    assert "| estimate | 1 |\n| no command | 1 |" in text
    part = report(cases[:1], record, of=2)
    assert part.name.endswith("-hostile-part.md")
    assert "They are a part of the 2 inputs of these areas" in part.read_text()


def test_a_command_that_does_nothing_for_long_is_ended_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(argv: list[str], folder: str, out: Path, err: Path, fresh: bool) -> None:
        out.touch()
        err.touch()
        signal.pause()

    monkeypatch.setattr(forking, "SECONDS", 0.1)
    monkeypatch.setattr(forking, "_become_command", hang)
    ended = forking._forked([], str(tmp_path / "case"))
    assert (ended["code"], ended["why"]) == (None, "time")
    assert forking._used(os.getpid()) > 0
