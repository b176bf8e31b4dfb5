"""A written field of a strategy that would be ignored is refused; a value at the end of a space's range is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autodistill.errors import InputError
from autodistill.strategy.named import check_effect, load_strategy, packaged_files
from autodistill.strategy.space import Space, load_space
from autodistill.strategy.strategy import Strategy

DEPLOYMENTS = [{"format": "huggingface", "bits": 16, "group_size": 0, "runtime": "transformers"}]
IDLE = [
    ({"init": {"depth": 1.0, "layers": "influence"}}, r"init.layers influence chooses .* leave init.layers out"),
    (
        {"distillation": {"divergence_weight": 0.0, "divergence": "taid", "mixture": 0.4, "signal_tokens": 8}},
        r"distillation.divergence, distillation.mixture, distillation.signal_tokens say .* leave them out",
    ),
    (
        {"distillation": {"divergence_weight": 0.0, "signal": "online", "signal_tokens": 0, "standardise": True}},
        r"distillation.standardise, distillation.signal, distillation.signal_tokens say",
    ),
    (
        {"distillation": {"divergence_weight": 0.0, "temperature": {"shape": "linear", "start": 5.0, "end": 1.0}}},
        r"distillation.temperature say",
    ),
    ({"distillation": {"alignment": {"projection": "none", "projection_rate": 99.0}}}, r"projection none has none"),
]
MOVING = {"divergence_weight": 0.0, "final_divergence_weight": 0.5, "divergence": "reverse_kl"}
USED = [
    {"init": {"depth": 0.9, "layers": "influence"}},
    {"distillation": MOVING},
    {"distillation": {"divergence_weight": 0.0, "alignment": {"projection": "linear", "projection_rate": 99.0}}},
]


@pytest.mark.parametrize(("written", "said"), IDLE)
def test_what_would_be_ignored_is_refused(written: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(InputError, match=f"strategy {path}: .*{said}"):
        load_strategy(str(path))
    path.write_text(
        yaml.safe_dump(
            {
                "dimensions": {"init.depth": {"choices": [0.5, 0.6]}},
                "deployments": DEPLOYMENTS,
                "baselines": {"mine": written},
            }
        )
    )
    with pytest.raises(InputError, match=f"space {path}: .*{said}"):
        load_space(str(path))


@pytest.mark.parametrize("written", [{}, {"init": {"source": "teacher"}}, {"init": {"ffn": 0.7}}])
def test_a_file_that_does_not_say_how_many_layers_are_kept_is_refused(written: dict, tmp_path: Path) -> None:
    """It would leave out a fifth of the layers, and nothing in it says so."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(InputError, match=rf"strategy {path}: init\.depth is not given: write `init: {{depth: 1\.0}}`"):
        load_strategy(str(path))


@pytest.mark.parametrize("written", USED)
def test_what_has_an_effect_is_not(written: dict) -> None:
    check_effect(Strategy.from_json(written))


def test_no_packaged_strategy_has_anything_that_is_ignored() -> None:
    for name in packaged_files("strategies"):
        load_strategy(name)
    for name in packaged_files("spaces"):
        load_space(name)


def test_a_space_may_propose_the_ends_of_its_dimensions() -> None:
    space = Space.from_json(
        {
            "dimensions": {
                "init.depth": {"low": 0.5, "high": 1.0},
                "init.layers": {"choices": ["even", "influence"]},
                "distillation.divergence_weight": {"low": 0.0, "high": 1.0},
                "distillation.divergence": {"choices": ["forward_kl", "reverse_kl"]},
            },
            "deployments": DEPLOYMENTS,
        }
    )
    proposed = list(space.extremes())
    assert any(one.init.depth == 1 and one.init.layers == "influence" for one in proposed)
    assert Space.from_json(space.to_json()) == space
