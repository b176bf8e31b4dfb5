"""Which limits bind, for made-up sums of scores."""

from __future__ import annotations

import pytest

from autodistill.hardware.budget import NO_LIMIT, Budget
from autodistill.models.config import spec_from_config
from autodistill.search.solve.call.limits import FILE_SIZE, MEMORY, limits_of, without
from autodistill.search.solve.options import Options
from autodistill.testing import save_tiny_teacher
from autodistill.utils.json_files import read_json


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = save_tiny_teacher(tmp_path_factory.mktemp("teacher"), layers=1)
    spec = spec_from_config(read_json(folder / "config.json"))
    return Options(spec=spec, budget=Budget(memory_bytes=10**8, context=256), file_bytes=10**7)


@pytest.mark.parametrize(
    ("no_memory", "no_file", "neither", "binds"),
    [
        (0.5, 0.5, 0.5, set()),  # in nats: none is better than within both limits
        (0.5 - 1e-9, 0.5, 0.5, set()),
        (0.2, 0.5, 0.2, {MEMORY}),
        (0.5, 0.2, 0.2, {FILE_SIZE}),
        (0.4, 0.3, 0.1, {MEMORY, FILE_SIZE}),
        (0.5, 0.5, 0.1, {MEMORY, FILE_SIZE}),  # removing only one limit gains nothing
        (None, 0.2, 0.2, {FILE_SIZE}),
    ],
)
def test_a_limit_binds_if_there_is_a_better_sum_without_it(
    options: Options, no_memory: float | None, no_file: float, neither: float, binds: set[str]
) -> None:
    sums = {frozenset({MEMORY}): no_memory, frozenset({FILE_SIZE}): no_file, frozenset({MEMORY, FILE_SIZE}): neither}
    deployment, need = options.smallest()
    found = {one["name"]: one for one in limits_of(options, deployment, 0.5, sums.__getitem__)}
    assert {name for name, one in found.items() if one["binds"]} == binds
    assert found[MEMORY]["left"] == 10**8 - need.total_bytes
    assert found[FILE_SIZE]["left"] == 10**7 - need.weights_bytes
    assert found[FILE_SIZE]["predicted_gain"] == pytest.approx(0.5 - no_file)


def test_options_without_a_limit_keep_the_others(options: Options) -> None:
    assert without(options, ()) == options
    assert without(options, {MEMORY}).budget == Budget(memory_bytes=NO_LIMIT, context=256)
    assert without(options, {MEMORY}).file_bytes == 10**7
    assert without(options, {FILE_SIZE}).budget == options.budget
    assert without(options, {FILE_SIZE}).file_bytes is None
