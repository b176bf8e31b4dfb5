"""docs/dimensions.md says of each dimension when it helps, or that this was not measured."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from autodistill.strategy import recipe, strategy

PAGE = Path(__file__).parents[2] / "docs" / "dimensions.md"
PARTS = (
    *(strategy.Init, strategy.Finishing, recipe.Distillation),
    *(recipe.Temperature, recipe.Alignment, recipe.Attention, recipe.Lora, recipe.OnPolicy),
)
NAMED = {
    name
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
    for code in re.findall(r"`([^`]+)`", line.split("|")[1])
    for name in re.findall(r"\w+", code)
}


@pytest.mark.parametrize("part", PARTS)
def test_each_field_of_a_strategy_is_a_row_of_the_page(part: type):
    assert {field.name for field in fields(part)} - NAMED == set()
