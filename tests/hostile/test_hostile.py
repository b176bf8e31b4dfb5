"""Every hostile input ends with its exit code and one line: a sample by default, all by the marker `hostile`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.__main__ import counts, faults
from tests.hostile.cases import Case, Kit, all_cases, areas
from tests.hostile.server import Server

_SAMPLE = 120
_AREAS = sorted(areas())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return all_cases(Kit(tmp_path_factory.mktemp("kit")))


def _check(cases: list[Case], server: Server, folder: Path) -> None:
    found = faults(cases, server, folder)
    print(counts(cases))
    assert not found, "\n".join(f"{case}: {fault}" for case, fault in found.items())


def test_a_sample_of_hostile_inputs_ends_in_one_line(cases: list[Case], server: Server, tmp_path: Path) -> None:
    _check(random.Random(0).sample(cases, min(_SAMPLE, len(cases))), server, tmp_path)


@pytest.mark.hostile
@pytest.mark.parametrize("area", _AREAS)
def test_every_hostile_input_ends_in_one_line(area: str, cases: list[Case], server: Server, tmp_path: Path) -> None:
    _check([case for case in cases if case.area == area], server, tmp_path)
