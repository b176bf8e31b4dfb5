"""Spaces: their contents, conversion between points and strategies in both directions, and the error of each fault."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.quantization.formats import FORMATS
from autodistill.strategy.dimension import Dimension
from autodistill.strategy.domains import Choices, Range
from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Attention, Temperature
from autodistill.strategy.space import Space, load_space
from autodistill.strategy.strategy import Finishing, Init, Strategy

DEPLOYMENTS = [{"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}]
SHAPE = "distillation.temperature.shape"
END = "distillation.temperature.end"


def space_of(dimensions, **fields) -> Space:
    return Space.from_json({"dimensions": dimensions, "deployments": DEPLOYMENTS} | fields)


def random_point(space: Space, seed: int):
    source = random.Random(seed)
    return next(space.points(lambda dimension: [dimension.domain.at(source.random())]))


def test_the_default_space_searches_what_the_project_is_known_by():
    space = load_space("declared")
    strategies = [space.strategy(random_point(space, seed)) for seed in range(600)]
    distillations = [strategy.distillation for strategy in strategies]
    alignments = [distillation.alignment for distillation in distillations if distillation.alignment]
    assert {distillation.temperature.shape for distillation in distillations} == {
        "constant",
        "linear",
        "cosine",
        "exponential",
    }
    assert len({distillation.temperature.start for distillation in distillations}) > 100
    assert len({distillation.temperature.end for distillation in distillations}) > 100
    aligned = {("last", 1), ("even", 2), ("even", 4), ("even", 8)}
    assert {(alignment.layers, alignment.count) for alignment in alignments} == aligned
    assert {alignment.projection for alignment in alignments} == {"none", "linear"}
    assert len(alignments) < len(strategies)
    grids = {("compressed-tensors", bits, group) for bits in (8, 4) for group in (32, 64)}
    grids |= {("gguf-q8_0", 8, 32), ("gguf-q4_0", 4, 32)}
    finishings = [strategy.finishing for strategy in strategies]
    assert {(item.format, item.bits, item.group_size) for item in finishings if item} == grids
    assert None in finishings
    assert {strategy.init.layers for strategy in strategies} == {"even", "influence", "block-influence"}
    # Fewer or narrower layers, and the teacher's own shape, which may be stored in fewer bits.
    assert any(strategy.init == Init(depth=1.0) for strategy in strategies)
    strategies = [strategy for strategy in strategies if strategy.init != Init(depth=1.0)]
    assert max(strategy.init.depth for strategy in strategies if strategy.init.ffn == 1) == 0.8
    assert {strategy.init.ffn for strategy in strategies if strategy.init.depth == 1} == {0.4, 0.5, 0.6, 0.7}
    assert all((strategy.init.depth == 1) != (strategy.init.ffn == 1) for strategy in strategies)
    assert {deployment.container for deployment in space.deployments} == {held.container for held in FORMATS.values()}


def test_the_documents_space_of_ones_own_is_one_all_of_whose_points_are_strategies(tmp_path: Path):
    document = (Path(__file__).parents[2] / "docs" / "spaces.md").read_text(encoding="utf-8")
    _, _, rest = document.partition("## A space of your own")
    (tmp_path / "mine.yaml").write_text(rest.partition("```yaml\n")[2].partition("```")[0])
    space = load_space(tmp_path / "mine.yaml")
    strategies = [space.strategy(random_point(space, seed)) for seed in range(200)]
    assert {strategy.distillation.divergence for strategy in strategies} == {"forward_kl", "jsd"}
    assert {strategy.init.depth for strategy in strategies} == {0.75, 1.0}
    assert {strategy.distillation.alignment is None for strategy in strategies} == {True, False}
    assert {strategy.distillation.temperature.shape for strategy in strategies} == {"constant", "linear", "cosine"}


def test_the_documents_space_of_k_quants_is_one(tmp_path: Path):
    document = (Path(__file__).parents[2] / "docs" / "spaces.md").read_text(encoding="utf-8")
    _, _, rest = document.partition("## K-quants")
    (tmp_path / "space.yaml").write_text("dimensions:\n" + rest.partition("```yaml\n")[2].partition("```")[0])
    space = load_space(tmp_path / "space.yaml")
    assert [one.name for one in space.deployments] == [
        f"gguf-{kind}" for kind in ("q6_k", "q5_k", "q5_k_m", "q4_k", "q4_k_m", "q3_k", "q2_k")
    ]
    finishings = {space.strategy(point).finishing for point in space.points(lambda dimension: dimension.domain.grid)}
    trained = {
        Finishing(format=name, bits=4, group_size=32, symmetric=False, scales="learned")
        for name in ("gguf-q4_k", "gguf-q4_k_m")
    }
    assert finishings == {None, *trained}


@pytest.mark.parametrize("seed", range(30))
def test_a_point_and_its_strategy_go_both_ways(seed):
    space = load_space("declared")
    point = random_point(space, seed)
    assert space.point(space.strategy(point)) == point


def test_named_strategies():
    recipe = load_strategy("hand_designed")
    assert recipe.distillation.temperature == Temperature(shape="linear", start=5.0, end=1.0)
    assert recipe.distillation.alignment is not None
    assert (recipe.distillation.alignment.projection, recipe.distillation.alignment.count) == ("linear", 4)
    assert recipe.finishing == Finishing(format="gguf-q8_0", bits=8, group_size=32)
    full = load_strategy("full_recipe")
    assert full.distillation.temperature == recipe.distillation.temperature
    assert full.distillation.attention == Attention(kind="maps")
    assert (full.distillation.alignment.projection, full.distillation.alignment.distance) == ("linear", "l2")
    assert load_strategy("logit_kd").distillation.divergence_weight == 1.0
    assert load_strategy("cross_entropy").distillation.divergence_weight == 0.0
    assert load_space("declared").baselines == {"hand_designed": recipe}
    assert load_space("declared").point(recipe) is not None


def test_a_strategy_outside_has_no_point():
    space = space_of({"init.depth": {"low": 0.5, "high": 0.7}, "finishing": {"choices": {"none": None}}})
    assert space.point(Strategy(init=Init(depth=0.6))) == {"init.depth": 0.6, "finishing": "none"}
    assert space.point(Strategy(init=Init(depth=0.8))) is None
    assert space.point(Strategy(init=Init(depth=0.6, layers="contiguous"))) is None  # no dimension could set it
    assert space.point(load_strategy("hand_designed")) is None


def test_a_space_of_a_baseline_alone_is_read_from_records_and_refused_as_a_file(tmp_path: Path) -> None:
    alone = {"dimensions": {}, "deployments": DEPLOYMENTS, "baselines": {"mine": Strategy().to_json()}}
    assert Space.from_json(alone).baselines == {"mine": Strategy()}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(alone), encoding="utf-8")
    with pytest.raises(InputError, match="dimensions must be a mapping with an entry"):
        load_space(tmp_path / "space.yaml")
    with pytest.raises(InputError, match="dimensions must be a mapping with an entry"):
        Space.from_json(alone | {"baselines": {}})


def test_json_and_yaml_round_trips(tmp_path: Path):
    space = load_space("declared")
    again = Space.from_json(yaml.safe_load(yaml.safe_dump(space.to_json(), sort_keys=False)))
    assert again == space
    assert again.hash == space.hash
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(space.to_json(), sort_keys=False))
    assert load_space(path) == load_space(str(path)) == space


def test_the_hash_is_of_what_matters():
    space = load_space("declared")
    data = space.to_json()
    assert Space.from_json(data | {"description": "other words"}).hash == space.hash
    for change in ({"deployments": data["deployments"][:3]}, {"baselines": {}}):
        assert Space.from_json(data | change).hash != space.hash
    turned = dict(reversed(list(data["dimensions"].items())))
    assert Space.from_json(data | {"dimensions": turned}).hash != space.hash  # proposals would differ


def test_conditions_come_first_whatever_the_order_of_the_file():
    data = load_space("declared").to_json()
    for seed in range(10):
        items = list(data["dimensions"].items())
        random.Random(seed).shuffle(items)
        space = Space.from_json(data | {"dimensions": dict(items)})
        before: set[str] = set()
        for dimension in space.dimensions:
            assert set(dimension.when) <= before
            before.add(dimension.path)


def test_points_are_all_the_points():
    shape = {"choices": ["constant", "linear"]}
    end = {"low": 2.0, "high": 3.0, "step": 0.5, "when": {SHAPE: ["linear"]}}
    layers = {"choices": ["even", "contiguous"]}
    space = space_of({END: end, SHAPE: shape, "init.layers": layers})
    found = {space.strategy(point) for point in space.points(lambda dimension: dimension.domain.grid)}
    wanted = set()
    for kind in ("even", "contiguous"):
        wanted.add(Strategy(init=Init(layers=kind)))
        for value in (2.0, 2.5, 3.0):
            schedule = Temperature(shape="linear", start=1.0, end=value)
            distillation = Strategy().distillation
            changed = {**distillation.to_json(), "temperature": schedule.to_json()}
            wanted.add(Strategy.from_json({"init": {"layers": kind}, "distillation": changed}))
    assert found == wanted


def test_a_constant_temperature_ends_where_it_starts():
    space = space_of({"distillation.temperature.start": {"low": 1.0, "high": 5.0}})
    point = {"distillation.temperature.start": 4.0}
    assert space.strategy(point).distillation.temperature == Temperature(start=4.0, end=4.0)


def test_the_extremes_are_the_corners_of_how_a_student_begins():
    space = load_space("declared")
    inits = {(strategy.init.depth, strategy.init.layers, strategy.init.ffn) for strategy in space.extremes()}
    shallow = {(depth, layers, 1.0) for depth in (0.6, 0.8) for layers in ("even", "influence", "block-influence")}
    assert inits == shallow | {(1.0, "even", ffn) for ffn in (0.4, 0.7, 1.0)}
    assert space.extremes()[-1] == space.baselines["hand_designed"]
    sibling = {"source": "pretrained", "model": "owner/name", "depth": 1.0}
    parts = {"shallow": {"depth": 0.3}, "deep": {"depth": 0.9, "layers": "influence"}, "sibling": sibling}
    ffn = {"low": 0.5, "high": 0.9, "when": {"init": ["shallow", "deep"]}}
    space = space_of({SHAPE: {"choices": ["linear"]}, "init": {"choices": parts}, "init.ffn": ffn})
    assert {strategy.init for strategy in space.extremes()} == {
        *(Init(depth=0.3, ffn=ffn) for ffn in (0.5, 0.9)),
        *(Init(depth=0.9, layers="influence", ffn=ffn) for ffn in (0.5, 0.9)),
        Init(**sibling),
    }
    space = space_of({SHAPE: {"choices": ["linear"]}})
    assert {strategy.init for strategy in space.extremes()} == {Init()}


@given(low=st.floats(1e-6, 10), width=st.floats(1e-3, 100), quantile=st.floats(0, 1), log=st.booleans())
def test_a_range_holds_what_it_gives(low, width, quantile, log):
    domain = Range(low=low, high=low + width, log=log)
    value = domain.at(quantile)
    assert domain.holds(value)
    assert domain.snap(value) == value
    exact = low * ((low + width) / low) ** quantile if log else low + quantile * width
    assert abs(value - exact) <= 0.0051 * exact  # three digits


@given(start=st.integers(-5, 5), count=st.integers(1, 20), step=st.sampled_from([0.05, 0.1, 0.25, 1.0, 3.0]))
def test_a_stepped_range_visits_each_value_alike(start, count, step):
    domain = Range(low=start * step, high=(start + count) * step, step=step)
    expected = [round((start + index) * step, 9) for index in range(count + 1)]
    assert [pytest.approx(value) for value in expected] == list(domain.grid)
    quantiles = [(index + 0.5) / (count + 1) for index in range(count + 1)]
    assert [domain.at(quantile) for quantile in quantiles] == list(domain.grid)


def test_a_range_rounds_to_its_digits_and_steps_and_stays_between_its_ends():
    plain, stepped, whole = (
        Range(low=0.1234, high=2.0),
        Range(low=0.5, high=1.0, step=0.1),
        Range(low=1, high=9, integer=True),
    )
    assert [plain.snap(number) for number in (-1, 0.1234, 0.9876, 1.23456, 5)] == [0.1234, 0.1234, 0.988, 1.23, 2.0]
    assert plain.corners == (0.1234, 2.0)
    assert [stepped.snap(number) for number in (0, 0.74, 0.76, 2)] == [0.5, 0.7, 0.8, 1.0]
    assert [stepped.holds(number) for number in (0.5, 0.7, 0.75, 0.7 + 1e-6, 1.0, 1.1, 0.4)] == [
        *[True] * 2,
        *[False] * 2,
        True,
        *[False] * 2,
    ]
    assert [whole.snap(number) for number in (0, 2.4, 2.6, 10)] == [1, 2, 3, 9]
    assert [whole.holds(number) for number in (0, 1, 9, 10)] == [False, True, True, False]
    assert plain.holds(0.123456)
    assert [whole.to_json(), stepped.to_json(), Range(low=1, high=2, log=True).to_json()] == [
        {"low": 1, "high": 9},
        {"low": 0.5, "high": 1.0, "step": 0.1},
        {"low": 1, "high": 2, "log": True},
    ]


def test_whole_ranges_are_whole():
    dimension = Dimension.from_json("distillation.alignment.rank", {"low": 8, "high": 64, "log": True})
    assert isinstance(dimension.domain, Range)
    assert dimension.domain.at(0.5) == 23  # sqrt(8 * 64) = 22.6
    assert type(dimension.domain.at(0.5)) is int
    assert not dimension.domain.holds(8.5)
    assert not dimension.domain.holds(True)


def test_a_whole_range_without_a_step_visits_every_whole_number():
    assert Range(low=2, high=5, integer=True).grid == (2, 3, 4, 5)
    assert Range(low=2.0, high=5.0).grid is None


def test_a_strategy_lies_at_the_fullest_choice_that_agrees_with_it_be_that_an_empty_one():
    choices = {
        "none": None,
        "plain": {},
        "second": {"count": 2},
        "low": {"count": 2, "projection": "low-rank", "rank": 8},
    }
    space = space_of({"distillation.alignment": {"choices": choices}})
    for name in choices:
        point = {"distillation.alignment": name}
        assert space.point(space.strategy(point)) == point, name


def test_widths_by_layer_are_a_choice_like_any():
    parts = {"narrow": {"depth": 1.0, "ffn": 0.5}, "own": {"depth": 1.0, "ffn_widths": [64, 128]}}
    fields = {"deployments": [{"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0}]}
    by_name = Space.from_json({"dimensions": {"init": {"choices": parts}}, **fields})
    strategy = by_name.strategy({"init": "own"})
    assert strategy.init.ffn_widths == (64, 128)
    assert by_name.point(strategy) == {"init": "own"}
    assert Space.from_json(by_name.to_json()).hash == by_name.hash
    widths = {"init.ffn_widths": {"choices": {"first": [64, 128], "last": [128, 64]}}}
    alone = Space.from_json({"dimensions": widths, **fields})
    assert alone.strategy({"init.ffn_widths": "last"}).init.ffn_widths == (128, 64)
    assert alone.point(Strategy(init=Init(ffn_widths=(64, 128)))) == {"init.ffn_widths": "first"}
    with pytest.raises(InputError, match=r"init\.ffn_widths: this is no number: give choices"):
        Space.from_json({"dimensions": {"init.ffn_widths": {"low": 1, "high": 2}}, **fields})
    contradicting = {"init.ffn": {"choices": [0.5]}, **widths}
    with pytest.raises(InputError, match=r"init\.ffn 0\.5 and init\.ffn_widths both say"):
        Space.from_json({"dimensions": contradicting, **fields})


def test_choices_tell_true_from_one():
    domain = Choices(values={True: True, False: False})
    assert domain.holds(True)
    assert not domain.holds(1)


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({}, "lacks"),
        ({SHAPE: "linear"}, f"lacks {END}"),
        ({SHAPE: "constant", END: 2.0}, "no active dimension"),
        ({SHAPE: "linear", END: 9.0}, "outside of its domain"),
        ({SHAPE: "square", END: 2.0}, "outside of its domain"),
        ({SHAPE: "constant", "init.depth": 0.5}, "no active dimension"),
    ],
)
def test_points_outside(point, said):
    end = {"low": 2.0, "high": 3.0, "when": {SHAPE: ["linear"]}}
    space = space_of({SHAPE: {"choices": ["constant", "linear"]}, END: end})
    with pytest.raises(InputError, match=said):
        space.strategy(point)


SHAPES = {"choices": ["constant", "linear"]}
FAULTS = {
    "unknown path": ({"distillation.temprature.shape": SHAPES}, "did you mean distillation.temperature.shape"),
    "not a path at all": ({"xyz": SHAPES}, "known: init"),
    "no mapping": ({SHAPE: ["linear"]}, "must have choices, or low and high: a mapping in a file"),
    "unknown field": ({SHAPE: {"choise": ["linear"]}}, "did you mean choices"),
    "both kinds": ({"init.depth": {"choices": [0.5], "low": 0.1}}, "not both"),
    "neither kind": ({"init.depth": {}}, "domain is empty"),
    "no high": ({"init.depth": {"low": 0.1}}, "domain is empty"),
    "empty list": ({"init.depth": {"choices": []}}, "domain is empty"),
    "empty names": ({"finishing": {"choices": {}}}, "domain is empty"),
    "choices of text": ({SHAPE: {"choices": "linear"}}, "must be a list"),
    "unnamed part": ({"finishing": {"choices": [None]}}, "give it a name"),
    "named by number": ({"finishing": {"choices": {1: None}}}, "name of a choice is text"),
    "repeated": ({SHAPE: {"choices": ["linear", "linear"]}}, "repeat"),
    "wrong type of choice": ({"init.depth": {"choices": ["half"]}}, "must be of type float"),
    "unknown choice": ({SHAPE: {"choices": ["square"]}}, "constant, linear"),
    "range of text": ({SHAPE: {"low": 1, "high": 2}}, "no number"),
    "range of a part": ({"finishing": {"low": 1, "high": 2}}, "no number"),
    "text bound": ({"init.depth": {"low": "a", "high": 2}}, "low must be a number"),
    "true bound": ({"init.depth": {"low": True, "high": 2}}, "low must be a number"),
    "broken number": ({"init.depth": {"low": float("nan"), "high": 1}}, "low must be a number"),
    "fraction of a rank": (
        {"distillation.alignment.rank": {"low": 1.5, "high": 2}},
        "low must be a number of type int",
    ),
    "turned": ({"init.depth": {"low": 0.8, "high": 0.5}}, "must be below high"),
    "equal": ({"init.depth": {"low": 0.5, "high": 0.5}}, "must be below high"),
    "log from 0": ({"init.depth": {"low": 0, "high": 0.5, "log": True}}, "logarithmic range starts above 0"),
    "log of text": ({"init.depth": {"low": 0.1, "high": 0.5, "log": "yes"}}, "true or false"),
    "log with step": ({"init.depth": {"low": 0.1, "high": 0.5, "log": True, "step": 0.1}}, "no step"),
    "uneven step": ({"init.depth": {"low": 0.1, "high": 0.5, "step": 0.3}}, "lead from"),
    "step of 0": ({"init.depth": {"low": 0.1, "high": 0.5, "step": 0}}, "above 0"),
    "end outside": ({"init.depth": {"low": 0.5, "high": 1.5}}, "fraction of the teacher's layers"),
    "when of text": ({SHAPE: SHAPES, END: {"low": 1, "high": 2, "when": "linear"}}, "when must be a mapping"),
    "when of no list": ({SHAPE: SHAPES, END: {"low": 1, "high": 2, "when": {SHAPE: "linear"}}}, "needs a list"),
    "when of nothing": ({SHAPE: SHAPES, END: {"low": 1, "high": 2, "when": {SHAPE: []}}}, "needs a list"),
    "when unknown": ({END: {"low": 1, "high": 2, "when": {SHAPE: ["linear"]}}}, "no dimension here"),
    "when another value": (
        {SHAPE: SHAPES, END: {"low": 1, "high": 2, "when": {SHAPE: ["liner"]}}},
        "being .liner., none of its choices: constant, linear$",
    ),
    "when of a range": (
        {"init.depth": {"low": 0.5, "high": 0.8}, END: {"low": 1, "high": 2, "when": {"init.depth": [0.5]}}},
        "which has no choices",
    ),
    "circle": (
        {
            SHAPE: SHAPES | {"when": {"init.layers": ["even"]}},
            "init.layers": {"choices": ["even"], "when": {SHAPE: ["linear"]}},
        },
        "circle",
    ),
    "never": (
        {
            SHAPE: SHAPES,
            "init.layers": {"choices": ["even"], "when": {SHAPE: ["linear"]}},
            "init.depth": {"low": 0.5, "high": 0.8, "when": {SHAPE: ["constant"], "init.layers": ["even"]}},
        },
        "init.depth can never be active",
    ),
    "a field of no part": (
        {
            "distillation.alignment": {"choices": {"none": None, "last": {"layers": "last"}}},
            "distillation.alignment.weight": {"low": 0.1, "high": 1.0},
        },
        "give it a condition",
    ),
    "set twice": (
        {
            "finishing": {"choices": {"q8": {"format": "gguf-q8_0", "bits": 8, "group_size": 32}}},
            "finishing.bits": {"choices": [8]},
        },
        "two dimensions",
    ),
    "contradiction": (
        {
            "distillation.alignment.layers": {"choices": ["even", "all"]},
            "distillation.alignment.count": {"choices": [1, 2]},
        },
        "leave count at 1",
    ),
    "no such grid": (
        {
            "finishing": {"choices": {"q4": {"format": "gguf-q4_0", "bits": 4}}},
            "finishing.group_size": {"choices": [32, 64]},
        },
        "gguf-q4_0",
    ),
    "end of a constant": (
        {"distillation.temperature.start": {"low": 1, "high": 5}, END: {"low": 1, "high": 5}},
        "constant temperature",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_dimensions(fault, tmp_path):
    dimensions, said = FAULTS[fault]
    path = tmp_path / "faulty.yaml"
    path.write_text(yaml.safe_dump({"dimensions": dimensions, "deployments": DEPLOYMENTS}))
    with pytest.raises(InputError, match=said) as caught:
        load_space(path)
    assert "\n" not in str(caught.value)
    assert "faulty.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dimensions": {}}, "with an entry"),
        ({"dimensions": ["init.depth"]}, "must be a mapping"),
        ({"deployments": []}, "no deployments"),
        ({"deployments": None}, "no deployments"),
        ({"deployments": DEPLOYMENTS * 2}, "listed twice"),
        ({"deployments": [DEPLOYMENTS[0] | {"group_size": 64}]}, "gguf-q8_0"),
        ({"deployments": [DEPLOYMENTS[0] | {"runtime": "vllm"}]}, "llama.cpp"),
        ({"baselines": ["hand_desined"]}, "did you mean hand_designed"),
        ({"baselines": "hand_designed"}, "must be a list"),
        ({"baselines": {"mine": {"init": {"depth": 2}}}}, "baselines.mine|init.depth"),
        ({"name": 3}, "name must be text"),
        ({"dimension": {}}, "did you mean dimensions"),
        ({"optional": {"init.layers": ["even"]}}, "no optional any more: leave it out"),
    ],
)
def test_faults_of_the_rest(change, said):
    dimensions = {"init.depth": {"low": 0.5, "high": 0.8}, "init.layers": {"choices": ["even", "influence"]}}
    whole = {"dimensions": dimensions, "deployments": DEPLOYMENTS}
    with pytest.raises(InputError, match=said):
        Space.from_json(whole | change)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dimensions: {}\nname: !!python/object/apply:os.system ['true']\n", "line 2: not plain data"),
        ("name: a\nname: b\n", "line 1: not plain data: the key name is given twice"),
        ("name: [1, 2\nother: {", "bad.yaml, line 2: not valid YAML"),
        ("", "must be a mapping"),
        ("- 1\n", "must be a mapping"),
        (b"\xff\xfe\xfa", "bad.yaml: not valid YAML"),
    ],
)
def test_files_that_are_not_plain_yaml(text, said, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as caught:
        load_space(path)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(InputError, match="did you mean default"):
        load_space("defualt")
    with pytest.raises(InputError, match="known: declared, default"):
        load_space("zzz")
    with pytest.raises(InputError, match="did you mean logit_kd"):
        load_strategy("logit-kd")
    for missing in (tmp_path / "none.yaml", str(tmp_path / "none.yaml"), "some/folder"):
        with pytest.raises(InputError, match="there is no space file"):
            load_space(missing)
    with pytest.raises(InputError, match=r"is a folder: give a YAML file in it"):
        load_space(str(tmp_path))


def test_a_strategy_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("init: {depth: 1.0}\ndistillation: {learning_rate: 5e-4}\n")
    assert load_strategy(path).distillation.learning_rate == 5e-4
    path.write_text("distillation: {learning_rat: 5e-4}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: .*learning_rat"):
        load_strategy(path)


def test_reading_changes_nothing():
    data = load_space("declared").to_json()
    before = copy.deepcopy(data)
    space = Space.from_json(data)
    for point in itertools.islice(space.points(lambda dimension: dimension.domain.corners), 50):
        space.strategy(point)
    assert data == before == space.to_json()


def test_it_loads_neither_torch_nor_ray_nor_optuna():
    program = (
        "import sys; from autodistill.strategy.space import load_space; load_space('declared');"
        "print([name for name in ('torch', 'ray', 'optuna', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_starts_lie_in_the_space_and_count_in_its_hash(tmp_path):
    space = load_space("declared")
    assert list(space.starts) == ["narrow", "quantized"]
    assert Space.from_json(space.to_json()) == space
    assert dataclasses.replace(space, starts={}).hash != space.hash
    data = space.to_json() | {"starts": ["from_scratch"]}
    with pytest.raises(InputError, match="from_scratch lies outside of the space"):
        Space.from_json(data)


def test_lengths_are_multiples_of_the_plans_tokens_the_plans_own_always_among_them():
    dimensions = {"init.depth": {"low": 0.5, "high": 0.8}}
    plain, longer = space_of(dimensions), space_of(dimensions, lengths=[2, 1.5])
    assert plain.lengths == (1.0,)
    assert longer.lengths == (1.0, 1.5, 2.0)
    assert space_of(dimensions, lengths=[100]).lengths == (1.0, 100.0)
    assert longer.hash != plain.hash
    assert Space.from_json(longer.to_json()) == longer
    for wrong in ([0.5], ["2"], [True], [101], 2):
        with pytest.raises(InputError, match="multiples of the plan's tokens"):
            space_of(dimensions, lengths=wrong)


def test_of_the_choices_that_hold_a_strategy_lies_at_the_one_that_says_most():
    parts = {"any": {}, "deep": {"depth": 1.0}, "both": {"depth": 1.0, "ffn": 0.5}}
    space = space_of({"init": {"choices": parts}})
    assert space.point(Strategy(init=Init(depth=1.0, ffn=0.5))) == {"init": "both"}
    assert space.point(Strategy(init=Init(depth=1.0))) == {"init": "deep"}


def test_the_hash_is_that_of_its_parts_in_their_order():
    """Runs keep it, so it stays the same from version to version."""

    def of(parts):
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    space = space_of({"init.depth": {"choices": [0.5, 1.0]}})
    data = space.to_json()
    parts = [[["init.depth", data["dimensions"]["init.depth"]]], data["deployments"], data["baselines"], []]
    assert space.hash == of(parts)
    several = space_of({"init.depth": {"choices": [0.5, 1.0]}}, lengths=[1, 2])
    assert several.hash == of([*parts, several.to_json()["lengths"]])
    weight = {"distillation.divergence_weight": {"choices": [0.25, 0.5]}}
    solved = space_of(weight, solved=True)
    raced = [list(item) for item in solved.to_json()["dimensions"].items()]
    parts = [raced, solved.to_json()["deployments"], solved.to_json()["baselines"], []]
    assert solved.hash == of([*parts, "solved", "types by deployments"])


def test_quantiles_of_choices_are_equal_parts_and_the_last_one_is_closed():
    choices = Choices(values={"a": 1, "b": 2, "c": 3})
    assert [choices.at(quantile) for quantile in (0.0, 0.33, 0.34, 0.66, 0.67, 0.99, 1.0)] == list("aabbccc")
