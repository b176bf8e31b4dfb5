from __future__ import annotations

from pathlib import Path

import pytest

import autodistill as ad

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


def test_a_pick_takes_a_run_or_a_list_of_runs():
    run = ad.load_run(REFERENCE / "search-20261129-210357")
    picked = ad.pick(runs=[run], device="rtx 4060 ti 16gb").document
    assert picked["pick"]["run"] == run.name
    assert ad.pick(run, device="rtx 4060 ti 16gb").document == picked
    assert ad.pick(str(run.path), device="rtx 4060 ti 16gb").document == picked
    with pytest.raises(ad.InputError, match="the list of runs is empty"):
        ad.pick(runs=[], budget="8GB")


def test_a_pick_refuses_values_of_a_wrong_type_and_says_what_it_takes():
    with pytest.raises(ad.InputError, match=r"^device is of type int: give a text$"):
        ad.pick(device=4090)  # type: ignore[arg-type]
    with pytest.raises(ad.InputError, match=r"^--budget must be above zero, not 0$"):
        ad.pick(budget=0)
    assert "device: Device to pick for, like 4090 or local" in str(ad.pick.__doc__)
