"""A student part of the way through its training: weights between both ends, on the grid of the training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.quantization.grids import Grid
from autodistill.quantization.learned_scales import read_scales
from autodistill.quantization.packing import deployed, quantize
from autodistill.runs.students import student_folder
from autodistill.search.worker.begin import begun
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.interpolated import interpolated
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import Trial
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy

Q4_1: dict[str, Any] = {"format": "gguf-q4_1", "bits": 4, "group_size": 32, "symmetric": False}
ON = Deployment(**Q4_1, runtime="llama.cpp")


@pytest.fixture
def setting(lab: Any, tmp_path: Path) -> TrialSetting:
    (tmp_path / "codes").mkdir()
    found: TrialSetting = lab.setting(tmp_path, codes=tmp_path / "codes")
    return found


def trained(setting: TrialSetting, finishing: Any, folder: Path) -> tuple[Strategy, Path]:
    """Train a student; return its strategy and its folder."""
    one = Strategy(init=Init(depth=0.5), distillation=Distillation(learning_rate=3e-3), finishing=finishing)
    task = TrialTask(id="t000", strategy=one, seed=0, deployments=(ON,), probe=ON, straight=True)
    Trial(Workbench(setting), task).run(2)
    return one, student_folder(folder / "t000")


def between(first: Any, part: Any, last: Any, share: float, names: set[str]) -> None:
    """Check that weights are the mean of both ends, weighted by `share`, in float64."""
    for name in names:
        ends = [model.get_parameter(name).detach().numpy().astype(np.float64) for model in (first, last)]
        expected = (1 - share) * ends[0] + share * ends[1]
        np.testing.assert_allclose(part.get_parameter(name).detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def stored(model: Any, names: Iterable[str]) -> dict[str, Grid]:
    """Return the grid of each of these weights that has one."""
    tensors = {tensor.name: tensor for tensor in spec_from_config(model.config.to_dict()).tensors}
    found = {name: ON.scheme.storage(tensors[name]) for name in names}
    return {name: one for name, one in found.items() if isinstance(one, Grid)}


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_codes_stay_and_scales_lie_between(setting: TrialSetting, tmp_path: Path, rounding: str) -> None:
    one, folder = trained(setting, Finishing(**Q4_1, scales="alone", rounding=rounding), tmp_path)
    last, learned = load_model(folder, torch.float32), read_scales(folder, ON)
    first, _ = begun(setting, one, 0)
    part, scales = interpolated(setting, one, 0, folder, 0.5)
    assert scales.keys() == learned.keys() == stored(part, scales).keys()
    between(first, part, last, 0.5, {name for name, _ in part.named_parameters()} - learned.keys())
    moved = 0
    for name, grid in stored(part, scales).items():
        values, ends = (model.get_parameter(name).detach().numpy() for model in (part, last))
        np.testing.assert_array_equal(deployed(values, grid, scales[name]), values)
        np.testing.assert_array_equal(quantize(values, grid, scales[name])[0], quantize(ends, grid, learned[name])[0])
        moved += not np.array_equal(values, ends)
    assert moved


@pytest.mark.parametrize("scales", [None, "absmax", "learned"])
def test_trained_weights_lie_between(setting: TrialSetting, tmp_path: Path, scales: str | None) -> None:
    one, folder = trained(setting, scales and Finishing(**Q4_1, scales=scales), tmp_path)
    last, learned = load_model(folder, torch.float32), read_scales(folder, ON)
    first, _ = begun(setting, one, 0)
    part, found = interpolated(setting, one, 0, folder, 0.25)
    between(first, part, last, 0.25, {name for name, _ in part.named_parameters()})
    assert found.keys() == learned.keys()
    assert bool(found) == (scales == "learned")
    for name, grid in stored(part, found).items():
        begins = quantize(first.get_parameter(name).detach().numpy(), grid)[1].scales
        np.testing.assert_allclose(
            found[name].scales, 0.75 * begins + 0.25 * learned[name].scales, rtol=2e-3, atol=1e-5
        )
