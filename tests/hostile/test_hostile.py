"""Every hostile input ends with its exit code and one line: some of each area by default, all by a marker."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.__main__ import counts, faults
from tests.hostile.cases import Case, Kit, all_cases, areas
from tests.hostile.server import Server

_OF_EACH = 6
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
def test_some_hostile_inputs_of_each_area_end_in_one_line(area: str, kit: Kit, server: Server, tmp_path: Path) -> None:
    # Those that a search would measure this machine for take seconds each.
    cheap = [case for case in all_cases(kit, only=(area,)) if not case.slow]
    _check(random.Random(area).sample(cheap, min(_OF_EACH, len(cheap))), server, tmp_path)


@pytest.mark.hostile
@pytest.mark.parametrize("area", _AREAS)
def test_every_hostile_input_ends_in_one_line(area: str, kit: Kit, server: Server, tmp_path: Path) -> None:
    _check(all_cases(kit, only=(area,)), server, tmp_path)
