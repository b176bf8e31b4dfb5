"""How fast a machine multiplies; plans of solving depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autodistill.evaluation.base import Scoring
from autodistill.search.solve import bench


class _Products(TorchDispatchMode):
    """Records the types in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("scoring", "kind"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_timed_in_the_precision_that_scores(
    monkeypatch: pytest.MonkeyPatch, scoring: Scoring, kind: torch.dtype
) -> None:
    monkeypatch.setattr(bench, "_MULTIPLIED", 16)
    with _Products() as products:
        rate, rounding = bench.speeds({}, scoring)
    assert products.seen == {kind}
    assert rate > 0
    assert rounding == {}
