"""Spaces made in Python equal those of the same YAML, with the same checks, and are read back as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autodistill.errors import InputError
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.domains import Choice, Float, Int
from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.space import Space, load_space, space_reference
from autodistill.strategy.strategy import Init, Strategy

YAML = """
name: mine
dimensions:
  init.depth: {low: 0.5, high: 1.0, step: 0.1}
  distillation.divergence: {choices: [forward_kl, jsd]}
  distillation.mixture: {low: 0.1, high: 0.9, when: {distillation.divergence: [jsd]}}
  distillation.learning_rate: {low: 5e-5, high: 1e-3, log: true}
  distillation.alignment:
    choices: {none: null, last: {layers: last, count: 1}}
  distillation.alignment.weight: {low: 0.3, high: 30.0, when: {distillation.alignment: [last]}}
  distillation.signal_tokens: {low: 4, high: 64}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
baselines: [gkd]
starts:
  one: {init: {depth: 0.5}, distillation: {signal_tokens: 8}}
lengths: [1, 2]
"""
Q8_0 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)


def python_space() -> Space:
    return Space(
        {
            "init.depth": Float(0.5, 1.0, step=0.1),
            "distillation.divergence": Choice("forward_kl", "jsd"),
            "distillation.mixture": Float(0.1, 0.9, when={"distillation.divergence": "jsd"}),
            "distillation.learning_rate": Float(5e-5, 1e-3, log=True),
            "distillation.alignment": Choice({"none": None, "last": {"layers": "last", "count": 1}}),
            "distillation.alignment.weight": Float(0.3, 30.0, when={"distillation.alignment": ["last"]}),
            "distillation.signal_tokens": Int(4, 64),
        },
        name="mine",
        deployments=[Q8_0],
        baselines=["gkd"],
        starts={"one": Strategy(init=Init(depth=0.5), distillation=Distillation(signal_tokens=8))},
        lengths=[1, 2],
    )


@pytest.mark.parametrize("kind", [Float, Int])
def test_a_third_number_is_named(kind: type[Float | Int]) -> None:
    """Otherwise a step would be taken for a condition, or the other way round."""
    assert kind(0, 1, step=1).to_json() == {"low": 0, "high": 1, "step": 1, "log": False}
    with pytest.raises(TypeError, match="positional"):
        kind(0, 1, 1)  # type: ignore[misc]


def test_the_same_space_in_yaml_has_the_same_hash(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    assert python_space() == load_space(path)
    assert python_space().hash == load_space(path).hash


def test_what_is_written_reads_back_as_the_same_space(tmp_path: Path) -> None:
    for name, space in {"mine": python_space(), "declared": load_space("declared")}.items():
        (tmp_path / f"{name}.yaml").write_text(space.to_yaml())
        assert load_space(tmp_path / f"{name}.yaml") == space


def test_a_reference_is_a_file_that_is_the_space(tmp_path: Path) -> None:
    space = python_space()
    reference = space_reference(space, tmp_path)
    assert space_reference(python_space(), tmp_path) == reference
    assert load_space(reference).hash == space.hash
    assert yaml.safe_load(Path(reference).read_text())["name"] == "mine"
    assert space_reference("default", tmp_path) == "default"


def test_students_are_packed_as_those_of_the_default_space_where_nothing_is_said() -> None:
    space = Space({"init.depth": Float(0.5, 1.0)})
    assert space.deployments == load_space("default").deployments
    assert (space.name, space.baselines, space.lengths) == ("unnamed", {}, (1.0,))


def test_strategies_are_named_or_given() -> None:
    given = Space({"init.depth": Float(0.5, 1.0)}, baselines={"gkd": load_strategy("gkd")})
    assert given.hash == Space({"init.depth": Float(0.5, 1.0)}, baselines=["gkd"]).hash
    idle = Strategy(init=Init(depth=1.0, layers="influence"))
    with pytest.raises(InputError, match=r"baselines.idle: init.layers influence chooses among the layers"):
        Space({"init.depth": Float(0.5, 1.0)}, baselines={"idle": idle})
    with pytest.raises(InputError, match="baselines has a strategy without a name: give a mapping of names"):
        Space({"init.depth": Float(0.5, 1.0)}, baselines=[Strategy()])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ({}, "dimensions must be a mapping with an entry"),
        ({"init.dept": Float(0.5, 1.0)}, "no strategy has init.dept; did you mean init.depth?"),
        ({"init.depth": Float(1.0, 0.5)}, "init.depth: low 1.0 must be below high 0.5"),
        ({"init.depth": Int(1, 2)}, "init.depth is no whole number: use Float"),
        ({"distillation.signal_tokens": Float(4.0, 64.0)}, "distillation.signal_tokens is a whole number: use Int"),
        ({"init.layers": Float(0.0, 1.0)}, "init.layers: this is no number"),
        ({"distillation.divergence": Choice()}, "the domain is empty"),
        ({"distillation.divergence": Choice("jsd", "jsd")}, "repeat a value"),
        (
            {"init.depth": 0.5},
            "init.depth must have choices, or low and high: a mapping in a file; Choice, Float or Int",
        ),
        ({"init.depth": Float(0.5, 1.0, when={"init.ffn": 1.0})}, "has a condition on init.ffn, no dimension here"),
        ({"init.depth": Float(0.5, 2.0)}, "depth"),
    ],
)
def test_faults_are_told_as_those_of_a_file(dimensions: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        Space(dimensions)  # type: ignore[arg-type]
