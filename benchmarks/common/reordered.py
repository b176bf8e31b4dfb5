"""The same model with its channels in another order: its weights lie in other groups, and so on no stored grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.export.student_reader import copy_tokenizer
from autodistill.models.loading import load_model, save_model
from autodistill.models.model_folder import folder_fingerprint
from autodistill.options import cache_folder
from autodistill.utils.hashing import content_hash

_INSIDE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj")


def reorder(model: Any, seed: int) -> None:
    """Reorder channels, FFN neurons, and values within each head. The model computes the same."""
    dice, config = np.random.default_rng(seed), model.config
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    size = config.hidden_size // heads if getattr(config, "head_dim", None) is None else config.head_dim
    channels = torch.from_numpy(dice.permutation(config.hidden_size))
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        part = name.split(".")[-2]
        if part in ("o_proj", "down_proj"):
            weight.data = weight.data[channels]
        else:
            weight.data = weight.data[..., channels]
    for layer in range(config.num_hidden_layers):
        own = {part: weights[f"model.layers.{layer}.{part}.weight"] for part in _INSIDE}
        neurons = torch.from_numpy(dice.permutation(config.intermediate_size))
        own["mlp.gate_proj"].data, own["mlp.up_proj"].data = (
            own[f"mlp.{n}_proj"].data[neurons] for n in ("gate", "up")
        )
        own["mlp.down_proj"].data = own["mlp.down_proj"].data[:, neurons]
        inside = [torch.from_numpy(dice.permutation(size)) for _ in range(groups)]
        values = torch.cat([group * size + one for group, one in enumerate(inside)])
        read = torch.cat([head * size + inside[head // (heads // groups)] for head in range(heads)])
        own["self_attn.v_proj"].data = own["self_attn.v_proj"].data[values]
        own["self_attn.o_proj"].data = own["self_attn.o_proj"].data[:, read]


def reordered(folder: Path, seed: int = 0) -> Path:
    """Return the folder in the cache that has a model of transformers in another order, written if it is not there."""
    path = cache_folder() / "benchmarks" / f"reordered-{content_hash([folder_fingerprint(folder), seed])}"
    if not path.exists():
        model = load_model(folder, torch.float32)
        with torch.no_grad():
            reorder(model, seed)
        part = path.with_suffix(".partial")
        save_model(model, part)
        copy_tokenizer(folder, part)
        part.rename(path)
    return path
