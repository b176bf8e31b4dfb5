"""Budgets that share a student: it fits the smaller one, and loses no quality against the larger one's student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.search.budgets.shared import ALIKE, shared
from autodistill.search.construction.construction import Construction
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_request
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.search.small_search import SPACE, small_request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shared")
    save_tiny_teacher(made / "teacher", layers=4, width=128)
    tiny_text(made / "text", documents=20)
    (made / "small.yaml").write_text(SPACE)
    return made


def config(folder: Path, memory_bytes: int, space: str | None = None) -> SearchConfig:
    request = small_request(folder, folder / "runs", budget=memory_bytes, context=64, name=None, space=space)
    return check_request(request)


def losing(one: SearchConfig, *kls: float) -> SearchConfig:
    """Return the settings with one construction for each of these KLs, each with another storage."""
    known = {found.deployment: found for found in one.constructions}
    assert len(known) >= len(kls)
    made = [replace(found, kl=kl, kl_stderr=0.0, solved=True) for found, kl in zip(known.values(), kls, strict=False)]
    return replace(one, constructions=tuple(made))


def of(one: SearchConfig) -> Construction:
    return one.constructions[0]


def test_a_student_that_loses_no_more_serves_larger_budgets(folder: Path) -> None:
    small, large, huge = (config(folder, size) for size in (30 * 10**6, 10**9, 16 * 10**9))
    first = losing(small, 2 * ALIKE)
    other = replace(of(large), deployment=replace(of(first).deployment, cache_type_k="q8_0"), kl=0.0, kl_stderr=0.0)
    best = replace(large, constructions=(other,))
    assert shared([first, best]) == [0, 1]
    assert shared([losing(small, ALIKE / 2), best]) == [0, 0]
    # Budgets are ordered by memory, not as typed. They share the student of the largest budget that has its own.
    same = replace(huge, constructions=(other,))
    assert shared([same, first, best]) == [2, 1, 2]


def test_the_same_construction_needs_no_score(folder: Path) -> None:
    small, large = (config(folder, size) for size in (30 * 10**6, 10**9))
    unknown = replace(of(small), kl=None)
    assert shared([replace(one, constructions=(unknown,)) for one in (small, large)]) == [0, 0]
    other = replace(unknown, deployment=replace(unknown.deployment, cache_type_k="q8_0"))
    assert shared([replace(small, constructions=(unknown,)), replace(large, constructions=(other,))]) == [0, 1]


def test_a_space_that_is_not_solved_is_the_same_where_the_same_fits(folder: Path) -> None:
    declared = str(folder / "small.yaml")
    large, huge = (config(folder, size, declared) for size in (10**9, 16 * 10**9))
    assert not large.constructions
    assert shared([huge, large]) == [1, 1]
