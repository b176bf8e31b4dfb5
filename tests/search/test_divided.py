"""A search whose teacher is divided over two processes: what it solves and its rows are those of an undivided one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.estimates.divided import splits
from autodistill.estimates.solving import SolvingWork
from autodistill.estimates.teacher_fit import TeacherFit
from autodistill.inference.blocks_on_disk import BlocksOnDisk
from autodistill.models.config import spec_from_config
from autodistill.runs.results.row import Row
from autodistill.search.campaign.observer import Observer
from autodistill.search.construction.construction import Construction
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.search import search
from autodistill.search.setup import loading, solve_phase
from autodistill.search.setup.solve_phase import construct
from autodistill.search.solve.call.request import work_on
from autodistill.search.workplace import workplace
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import WHOLE
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json
from tests.search.small_search import middle_budget, small_inputs, small_request


class Lines(Observer):
    """Keeps the lines that the user sees."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


Fit = Callable[..., None]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Make up how this machine holds the teacher. Several processes meet over gloo."""
    fit_teacher = loading.fit_teacher

    def hold(processes: int, **changes: Any) -> None:
        def fit(*given: Any, **more: Any) -> TeacherFit:
            found = fit_teacher(*given, **more)
            return replace(found, held_type="bfloat16", processes=processes, **changes)

        monkeypatch.setattr(loading, "fit_teacher", fit)

    return hold


@pytest.mark.slow
def test_a_teacher_that_one_device_does_not_hold_is_divided_and_its_rows_stay(tmp_path: Path, held: Fit) -> None:
    inputs = small_inputs(tmp_path)

    def rows(processes: int) -> tuple[dict[str, Row], list[str]]:
        held(processes)
        told = Lines()
        request = small_request(inputs, tmp_path / f"runs-{processes}", cache=tmp_path / f"cache-{processes}")
        return {row.name: row for row in search(request, told).rows}, told.lines

    one, _ = rows(1)
    two, lines = rows(2)
    assert any("on each of 2 GPUs, over which it is divided" in line for line in lines)
    assert one.keys() == two.keys()
    for name, row in one.items():
        for metric in ("accuracy", "perplexity"):
            assert getattr(two[name], metric) == pytest.approx(getattr(row, metric), rel=0.02), (name, metric)


WHOLE_ALONE = ("init.depth", "init.ffn", "init.heads")


def solved_request(folder: Path, **changes: Any) -> SearchRequest:
    """Return a request for a search that solves the types of the whole teacher, with fewer than 8 bits."""
    if not (folder / "teacher").exists():
        save_tiny_teacher(folder / "teacher", layers=2, width=128, heads=2, kv_heads=2, ffn=256)
        tiny_text(folder / "text", documents=20, sentences=24)
    fields: dict[str, Any] = {
        "budget": middle_budget(folder / "teacher", 64),
        "space": Space({path: {"choices": [1.0]} for path in WHOLE_ALONE}, solved=True),
        "tokens": 1024,
        "sequence_length": 64,
    }
    return small_request(folder, folder / "runs", **(fields | changes))


def constructed(request: SearchRequest, **changes: Any) -> tuple[tuple[Construction, ...], list[str]]:
    """Return the constructions of a search, without its plan and its trials, and the lines about them.

    `changes` are made to the checked request.
    """
    config, lines = check_request(request), []
    with workplace(config) as (place, _):
        found = construct(replace(config, **changes), loading.load(config, place), lines.append)
    return found.constructions, lines


def by_storage(constructions: tuple[Construction, ...]) -> Mapping[str, tuple[float | None, bool]]:
    """Return the KL of each storage of the whole teacher, and whether it was solved."""
    return {str(one.deployment): (one.kl, one.solved) for one in constructions if one.init == WHOLE}


@pytest.mark.slow
def test_a_divided_teacher_has_the_solution_of_an_undivided_one(
    tmp_path: Path, held: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read from the same files, so scores differ only by the order in which products are summed."""
    whole, _ = constructed(solved_request(tmp_path, cache=tmp_path / "cache-1"))
    held(2)
    read: list[int] = []
    predicted: list[SolvingWork] = []
    monkeypatch.setattr(BlocksOnDisk, "block", _noting(BlocksOnDisk.block, lambda _, index: read.append(index)))

    def predict(*of: Any, **how: Any) -> SolvingWork:
        predicted.append(work_on(*of, **how))
        return predicted[-1]

    monkeypatch.setattr(solve_phase, "work_on", predict)
    apart, lines = constructed(solved_request(tmp_path, cache=tmp_path / "cache-2"))
    expected, found = by_storage(whole), by_storage(apart)
    assert any(solved for _, solved in expected.values())
    assert found.keys() == expected.keys()
    for name, (kl, solved) in expected.items():
        assert found[name] == (pytest.approx(kl, rel=1e-4, abs=1e-7), solved)
    (line,) = [line for line in lines if line.startswith("no device holds the teacher in float32")]
    assert "so types are solved with one layer in memory at a time" in line
    assert "cuts are not scored" in line
    # The prediction counts the most storages that may be measured.
    assert 0.6 * predicted[0].readings <= read.count(0) <= predicted[0].readings
    assert read.count(0) == read.count(1)


def _noting(call: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    """Return the same function, which first passes its arguments to another one."""

    def noted(*given: Any) -> Any:
        note(*given)
        return call(*given)

    return noted


@pytest.mark.slow
def test_a_search_with_a_divided_teacher_begins_with_its_solution(tmp_path: Path, held: Fit) -> None:
    """The teacher has a row in the solved types if its parts hold whole groups. A student in them is exported."""
    held(2)
    outcome = search(solved_request(tmp_path))
    asked = read_json(tmp_path / "runs" / "run" / "search.json")
    solved = [one for one in map(Construction.from_json, asked["constructions"]) if one.solved]
    assert solved
    rows = {kind: [row.deployment for row in outcome.rows if row.kind == kind] for kind in ("teacher", "student")}
    spec = spec_from_config(read_json(tmp_path / "teacher" / "config.json"))
    for one in solved:
        assert (one.deployment in rows["teacher"]) is not splits(spec, one.deployment, 2)
    assert any(one.deployment in rows["student"] for one in solved)
    assert (tmp_path / "runs" / "run" / "student" / "gguf" / "student.gguf").exists()


def test_a_solution_that_this_machine_cannot_make_is_left_out_in_one_line(tmp_path: Path, held: Fit) -> None:
    request = solved_request(tmp_path)

    def refused(request: SearchRequest) -> str:
        found, lines = constructed(request)
        assert not any(one.solved or one.kl for one in found)
        (line,) = [line for line in lines if line.startswith("nothing is solved, and plain storages")]
        assert "\n" not in line
        return line

    held(2, limit_bytes=10**6)
    assert "one layer at a time takes" in refused(request)
    assert "of 1.00 MB" in refused(request)
    held(2)
    timed = replace(request, trials=None, tokens=None, time=0.01)
    assert "with more --time types are solved" in refused(timed)
    narrow = Space({"init.ffn": {"choices": [0.5]}}, solved=True)
    assert "only the whole teacher is scored" in refused(replace(request, space=narrow))
    with pytest.raises(InputError, match=r"--candidate .* a file is compared with the whole teacher"):
        constructed(request, candidates=("teacher.gguf",))
