"""Models with random weights, saved as transformers saves them, with a tokenizer of 300 entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from autodistill.testing import tiny_tokenizer


def saved(
    configs: Mapping[str, Callable[[], Any]], folder: Path, change: Callable[[str, Any], None]
) -> dict[str, Path]:
    """Save a model of each config to a folder, after changing its weights in place."""
    found = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            change(name, model)
        found[name] = folder / name
        model.save_pretrained(found[name])
        tiny_tokenizer(300).save_pretrained(found[name])
    return found
