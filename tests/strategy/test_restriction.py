"""Restrictions that a solved space may put on shapes and storages, and those that contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.quantization.formats import TYPES
from autodistill.strategy.space import Space, load_space
from autodistill.strategy.strategy import Init

RACED = {"distillation.divergence_weight": {"low": 0.5, "high": 1.0}}
Q4 = {"runtime": "llama.cpp", "format": "gguf-q4_0", "bits": 4, "group_size": 32}
Q8 = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
INT4 = {"runtime": "vllm", "format": "compressed-tensors", "bits": 4, "group_size": 32}


def space(dimensions: dict[str, Any], *deployments: Any) -> Space:
    return Space({**RACED, **dimensions}, deployments=deployments or None, solved=True)


def choices(*values: Any) -> dict[str, Any]:
    return {"choices": list(values)}


def test_a_list_narrows_the_types_and_one_value_fixes_them() -> None:
    assert space({}).restriction.kinds is None
    assert space({"finishing.bits": choices(4)}).restriction.kinds == ("q4_1", "iq4_nl", "q4_0", "q4_k", "mxfp4")
    assert space({"finishing.bits": choices(4, 8), "finishing.symmetric": choices(True)}).restriction.kinds == (
        *("q8_0", "iq4_nl", "q4_0", "mxfp4"),
    )
    assert space({"finishing.format": choices("gguf-q5_0")}).restriction.kinds == ("q5_0",)
    assert space({"finishing.bits": {"low": 4, "high": 5}}).restriction.kinds == tuple(
        kind for kind, grid in TYPES.items() if not isinstance(grid, str) and grid.bits in (4, 5)
    )
    parts = {"none": None, "q4": {"format": "gguf-q4_0", "bits": 4, "group_size": 32}}
    assert space({"finishing": {"choices": parts}}).restriction.kinds == ("f16", "q4_0")


def test_scales_are_learned_of_even_grids_alone() -> None:
    kinds = space({"finishing.scales": choices("absmax", "learned")}).restriction.kinds
    assert kinds is not None
    assert not {"iq4_nl", "mxfp4"} & set(kinds)


def test_shapes_are_named_or_their_fractions_narrowed() -> None:
    told = space({"init.depth": {"low": 0.5, "high": 1.0}, "init.ffn": choices(1.0, 0.5)}).restriction
    assert told.inits is None
    assert told.depth(0.75)
    assert not told.depth(0.4)
    assert told.ends("init.ffn") == (1.0, 0.5)
    parts = {"whole": {"depth": 1.0}, "shallow": {"depth": 0.5}}
    named = space(
        {"init": {"choices": parts}, "init.layers": {**choices("even", "influence"), "when": {"init": ["shallow"]}}}
    )
    assert named.restriction.inits == (
        Init(depth=1.0),
        Init(depth=0.5, layers="even"),
        Init(depth=0.5, layers="influence"),
    )


def test_deployments_are_all_that_may_be_chosen_unless_types_are_solved() -> None:
    fixed = space({}, Q4, INT4).restriction.fixed
    assert fixed is not None
    assert [one.name for one in fixed] == ["gguf-q4_0"]
    assert space({}, "solved", Q4).restriction.fixed is None
    assert load_space("default").types_solved


@pytest.mark.parametrize("deployments", [(), ("solved", Q8), (Q4, Q8)])
def test_it_is_written_as_it_was_read(deployments: tuple[Any, ...]) -> None:
    one = space({"finishing.bits": choices(4, 8), "init.depth": {"low": 0.5, "high": 1.0}}, *deployments)
    again = Space.from_json(one.to_json())
    assert again == one
    assert again.hash == one.hash
    assert one.hash != space({"finishing.bits": choices(8), "init.depth": {"low": 0.5, "high": 1.0}}, *deployments).hash
    assert space({}, "solved", Q8).hash != space({}, Q8).hash


@pytest.mark.parametrize(
    ("dimensions", "deployments", "said"),
    [
        (
            {"finishing.bits": choices(8), "finishing.format": choices("gguf-q4_0")},
            (),
            r"finishing\.bits and finishing\.format contradict each other",
        ),
        (
            {"finishing.bits": choices(4), "finishing.symmetric": choices(True), "finishing.group_size": choices(16)},
            (),
            r"finishing\.bits and finishing\.group_size contradict each other",
        ),
        ({"finishing.bits": choices(8)}, (Q4,), r"finishing\.bits and deployments \(gguf-q4_0\) contradict each other"),
        ({"finishing.bits": choices(4)}, (INT4,), r"finishing\.bits .* no deployment is for llama\.cpp"),
        ({"finishing.bits": choices(7)}, (), r"finishing\.bits is 7, which no type of GGUF has"),
        ({"finishing.keep": choices("head")}, (), r"finishing\.keep is nothing that is solved"),
        (
            {"finishing": {"choices": {"int4": {"format": "compressed-tensors", "bits": 4, "group_size": 32}}}},
            (),
            r"finishing\.int4 is compressed-tensors-int4-g32, and types by tensor are solved in GGUF",
        ),
        ({"init.depth": choices(1.5)}, (), r"init\.depth is a fraction of the teacher's above 0, not 1\.5"),
        ({"init": {"choices": {"whole": {"depth": 1.0}}}, "init.depth": choices(0.5)}, (), "set by two dimensions"),
        ({"init.source": choices("scratch")}, (), r"init\.source scratch leaves nothing of the teacher"),
        ({"init.width": {"low": 0.5, "high": 1.0}}, (), r"init\.width is a range next to other dimensions"),
        (
            {"finishing.bits": {**choices(4), "when": {"distillation.divergence_weight": [0.5]}}},
            (),
            r"condition on distillation\.divergence_weight",
        ),
        ({}, ("solved",), "deployments has 'solved' once, and beside it"),
    ],
)
def test_what_contradicts_itself_is_named(dimensions: Any, deployments: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        space(dimensions, *deployments)


def test_keys_that_a_solved_space_has_no_use_for_name_what_took_their_place() -> None:
    with pytest.raises(InputError, match="in place of starts"):
        Space(RACED, starts=["gkd"], solved=True)
    with pytest.raises(InputError, match="there is no optional any more"):
        Space.from_json(space({"init.depth": choices(0.5, 1.0)}).to_json() | {"optional": {"init.depth": [1.0]}})
    with pytest.raises(InputError, match="there is no optional any more"):
        Space(RACED, optional={"init.depth": [1.0]})
    with pytest.raises(InputError, match="no field baseline; did you mean baselines"):
        Space(RACED, baseline=["gkd"])
    with pytest.raises(InputError, match="solved is true or false"):
        Space(RACED, solved="yes")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the space is not solved"):
        Space(RACED, deployments=["solved", Q4])
