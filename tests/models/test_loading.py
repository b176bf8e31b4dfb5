"""Layers of a loaded model, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from autodistill.models.families import FAMILIES, get_family
from autodistill.models.loading import load_model, watched_layers
from autodistill.testing import save_tiny_teacher

IDS = torch.arange(64).view(2, 32) * 7 % 300


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_is_seen_of_a_layer_is_the_state_behind_it(architecture: str, tmp_path: Path) -> None:
    model = load_model(save_tiny_teacher(tmp_path, architecture=architecture, layers=3), torch.float32)
    seen: dict[int, Tensor] = {}
    with torch.no_grad():
        with watched_layers(model, range(3), seen.__setitem__):
            whole = model.base_model(IDS, output_hidden_states=True, use_cache=False)
        assert sorted(seen) == [0, 1, 2]
        # transformers keeps the state in front of each layer, and at the end the state behind the final norm.
        assert seen[0].equal(whole.hidden_states[1])
        assert seen[1].equal(whole.hidden_states[2])
        norm = model.base_model.get_submodule(get_family(architecture).final_norm)
        assert norm(seen[2]).equal(whole.last_hidden_state)
        seen.clear()
        model.base_model(IDS, use_cache=False)
    assert seen == {}
