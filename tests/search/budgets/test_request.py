"""What a user may ask of a search for several budgets, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.search.budgets.request import BudgetsRequest


def test_budgets_are_called_what_was_typed() -> None:
    asked = BudgetsRequest(budgets="150MB, 1.5 GB,2GiB", device=None)
    assert asked.several
    assert {label: one["budget"] for label, one in asked.limits().items()} == {
        "150MB": 150 * 10**6,
        "1.5GB": 1_500_000_000,
        "2GiB": 2 * 2**30,
    }
    assert list(BudgetsRequest(budgets=[150 * 10**6, "1GB"]).limits()) == ["150MB", "1GB"]


def test_tiers_are_devices() -> None:
    asked = BudgetsRequest(tiers="pi 5, rtx 4060 ti 16gb")
    assert asked.limits() == {"pi-5": {"device": "pi 5"}, "rtx-4060-ti-16gb": {"device": "rtx 4060 ti 16gb"}}
    one = asked.alone(name="some", **asked.limits()["pi-5"])
    assert (one.device, one.budget, one.name) == ("pi 5", None, "some")


def test_one_budget_is_an_ordinary_search() -> None:
    assert not BudgetsRequest(budget="1GB").several
    with pytest.raises(InputError, match="search needs the memory"):
        BudgetsRequest()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budgets": "1GB,2GB", "budget": "1GB"}, "--budget is one limit"),
        ({"tiers": "pi 5,4090", "budget": "1GB"}, "--budget is one limit"),
        ({"budgets": "1GB,2GB", "tiers": "pi 5,4090"}, "give one of the two"),
        ({"tiers": "pi 5,4090", "device": "4090"}, "--device is one device and --tiers are several"),
        ({"budgets": "1GB,1000MB"}, r"--budgets has 1000MB twice \(1GB is the same\)"),
        ({"tiers": "pi 5,pi-5"}, "--tiers has pi-5 twice"),
        ({"budgets": "1GB"}, "--budgets takes 2 to 12.*for a single one give --budget"),
        ({"budgets": ",".join(f"{size}GB" for size in range(1, 14))}, "2 to 12.*not 13"),
        ({"budgets": "1GB,,2GB"}, "has an empty part"),
        ({"budgets": "1GB,much"}, "'much' is not an amount of memory"),
        ({"budgets": " "}, "budgets is empty"),
        ({"budgets": "1GB,2GB", "devices": ["mine.yaml"]}, "--devices only describes devices"),
        ({"budgets": "1GB,2GB", "context": 0}, "--context must be at least 1"),
        ({"budgets": "1GB,2GB", "batch": 2, "latency": "50ms@streams=4"}, "--batch 2 contradicts --latency"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        BudgetsRequest(**given)
    assert "\n" not in str(error.value)
