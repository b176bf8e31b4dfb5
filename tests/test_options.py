from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import autodistill as ad
from autodistill.search.request.request import SearchRequest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": 0}, "--time must be above zero, not 0"),
        ({"time": -3.5}, "--time must be above zero, not -3.5"),
        ({"time": math.inf}, "--time must be a finite number, not inf"),
        ({"explore": math.nan}, "--explore must be a finite number, not nan"),
        ({"time": timedelta(minutes=2)}, "time is of type timedelta: give a text or a number"),
        ({"seed": -(10**400)}, f"--seed must be at least 0, not -1{0:0400}"),
        ({"time": True}, "time is of type bool: give a text or a number"),
        ({"trials": "3"}, "trials is of type str: give a whole number"),
        ({"tokens": 1.5}, "tokens is of type float: give a text or a whole number"),
        ({"students_only": "no"}, "students_only is of type str: give True or False"),
        ({"space": 3}, "space is of type int: give a text or a path or a Space"),
        ({"evaluators": object()}, "evaluators is of type object: give a list"),
        ({"checkpoint_limit": 0}, "--checkpoint-limit must be above zero, not 0"),
    ],
)
def test_a_value_from_python_that_no_option_takes_is_refused_by_name(options: dict[str, Any], message: str):
    with pytest.raises(ad.InputError) as refused:
        SearchRequest(**{"budget": "8GB", **options})
    assert str(refused.value) == message


def test_a_whole_number_may_be_a_float_or_numpy_s():
    request = SearchRequest(budget=8e9, tokens=np.float64(1e6), trials=np.int64(3), time=90)
    assert (request.budget, request.tokens, request.trials, request.time) == (8_000_000_000, 1_000_000, 3, 90)
    assert {type(request.budget), type(request.tokens), type(request.trials)} == {int}


def test_one_text_is_a_list_of_one_where_an_option_may_be_repeated():
    request = SearchRequest(budget="8GB", baseline="gkd", candidate=Path("a.gguf"), log="tensorboard")
    assert (request.baseline, request.candidate, request.log) == (("gkd",), (Path("a.gguf"),), ("tensorboard",))
    assert SearchRequest(budget="8GB", baseline=["gkd", "taid"]).baseline == ["gkd", "taid"]
