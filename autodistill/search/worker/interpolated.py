"""A student whose weights lie between those at the beginning and at the end of its training.

There, a fine-tuned model keeps most of what it learned, and forgets less than at the end: WiSE-FT (arXiv:2109.01903).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autodistill.distillation.training.trained_scales import TrainedScales
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.learned_scales import read_scales
from autodistill.search.worker.begin import on_codes, student_of
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.strategy import Strategy


@torch.no_grad()
def interpolated(
    setting: TrialSetting, strategy: Strategy, seed: int, trained: Path, share: float
) -> tuple[Any, Mapping[str, Scales]]:
    """Return a student part of the way through its training, in float32 on the trials' device, and its scales.

    Codes that training kept stay as they are. Their scales are rounded as the file holds them, so that the student lies
    on its grid as the trained one does.

    Args:
        setting: Setting of the trials.
        strategy, seed: Those of the student.
        trained: Folder of the student after training.
        share: Share of the way, from 0 at the beginning to 1 at the end.
    """
    model, _ = student_of(setting, strategy, seed)
    model = model.to(setting.device)
    begun = on_codes(setting, strategy, model) or {}
    learned = read_scales(trained, strategy.finishing.scheme) if strategy.finishing else {}
    spec = spec_from_config(model.config.to_dict())
    tensors = {tensor.name: tensor for tensor in spec.tensors}

    def grid_of(name: str) -> Grid | None:
        """Return the grid whose scales were learned for a weight."""
        assert strategy.finishing is not None
        storage = strategy.finishing.storage(tensors[name]) if name in learned else None
        return storage if isinstance(storage, Grid) else None

    parameters = dict(model.named_parameters())
    on_grid = learned if strategy.scales_alone else {}
    first = {name: one.detach().clone() for name, one in parameters.items() if name not in on_grid}
    found: Mapping[str, Scales] = {}
    if learned:
        held = TrainedScales(model, grid_of, begun)
        for name, weight in held.by_name.items():
            weight.move(learned[name], share)
        found = held.settle()
    ends = dict(load_model(trained, torch.float32, setting.device).named_parameters())
    for name, beginning in first.items():
        parameters[name].data = beginning.lerp_(ends[name].detach(), share)
    return model, found
