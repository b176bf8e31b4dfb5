"""Widths per layer and types, solved together, compared with every possible choice."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autodistill.distillation.student.shapes import cut_spec
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.search.solve.library import Score
from autodistill.search.solve.options import Options
from autodistill.search.solve.widths import Widths
from autodistill.strategy.strategy import Init
from autodistill.testing import tiny_config

LAYERS, FFN = 2, 256
WIDTHS = (256, 192, 64)
KINDS = ("q8_0", "q4_0")


class Few(Options):
    """Two types for all matrices and one cache, so that all choices can be enumerated."""

    def kinds(self, tensor: Any) -> tuple[str, ...]:
        return KINDS if tensor.name.endswith(("down_proj.weight", "up_proj.weight")) else KINDS[1:]

    caches = (("f16", "f16"),)  # type: ignore[assignment]


def score(name: str, kind: str) -> Score:
    dice = np.random.default_rng([ord(letter) for letter in name])
    return Score(
        kl=0.0 if kind == "f16" else float(dice.random()) * (0.02 if kind == "q8_0" else 0.2), stderr=0, exact=True
    )


def cost_of_width(layer: int, width: int) -> Score:
    return Score(kl=(1 + 2 * layer) * 0.4 * (1 - width / FFN) ** 1.5, stderr=0.0, exact=True)


def test_the_knapsack_finds_the_best_of_all_widths_and_types() -> None:
    spec = spec_from_config(tiny_config(num_hidden_layers=LAYERS, intermediate_size=FFN))
    options = Few(spec=spec, budget=Budget(memory_bytes=10**9, context=256))
    library: Any = SimpleNamespace(score=score)
    shapes: Any = SimpleNamespace(widths=WIDTHS, ffn=cost_of_width)
    solver = Widths(options, library, shapes)

    every = []
    for widths in product(WIDTHS, repeat=LAYERS):
        cut = Few(spec=cut_spec(Init(depth=1.0, ffn_widths=widths), spec), budget=options.budget)
        free = [name for name, tensor in cut.matrices.items() if len(cut.kinds(tensor)) > 1]
        fixed = {name: KINDS[1] for name in (*cut.matrices, *cut.tables) if name not in free}
        for kinds in product(KINDS, repeat=len(free)):
            types = fixed | dict(zip(free, kinds, strict=True))
            need = cut.memory(cut.deployment(types, ("f16", "f16"))).total_bytes
            cost = sum(cost_of_width(layer, width).kl for layer, width in enumerate(widths))
            for name, kind in types.items():
                layer = int(name.split("layers.")[1][0]) if "layers." in name else 0
                cost += score(name, kind).kl * (widths[layer] / FFN if ".mlp." in name else 1)
            every.append((need, cost, widths))
    needs = sorted({need for need, _, _ in every})
    assert solver.best(needs[0] - 1) == []
    for limit in [*needs[:: len(needs) // 12], needs[-1]]:
        least = min(cost for need, cost, _ in every if need <= limit)
        (found,) = solver.best(limit)
        assert min(cost for need, cost, widths in every if need <= limit and widths == found) == pytest.approx(least)
        several = solver.best(limit, len(WIDTHS))
        assert several[0] == found
        assert len(set(several)) == len(several)
        costs = [min(cost for need, cost, other in every if need <= limit and other == widths) for widths in several]
        assert costs[0] == min(costs)
    assert len(several) > 1
