"""Every benchmark can be loaded with the package as it is now."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
# What a program alone needs, and no extra installs.
NEEDED = {"torchao_reference": "torchao"}


def test_every_benchmark_is_loaded():
    names = [
        path.stem
        for path in sorted(FOLDER.glob("*.py"))
        if path.stem not in NEEDED or importlib.util.find_spec(NEEDED[path.stem])
    ]
    assert len(names) > 30
    call = [sys.executable, "-c", f"import {', '.join(names)}"]
    done = subprocess.run(call, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_both_losses_of_trl_are_the_same_divergence(monkeypatch, beta):
    """What is timed is held to one figure: the mean over tokens of the generalised JSD, and its gradient."""
    monkeypatch.syspath_prepend(FOLDER)
    program = importlib.import_module("distill_step")
    source = torch.Generator().manual_seed(0)
    states, wanted = (torch.randn(2, 5, 16, generator=source) for _ in range(2))
    head, wanted_head = (torch.randn(50, 16, generator=source) for _ in range(2))
    own = head.clone().requires_grad_()
    experimental = program.experimental_loss(states @ own.T, wanted @ wanted_head.T, beta)
    (expected,) = torch.autograd.grad(experimental, own)
    stable = program.stable_loss(states, own, wanted, wanted_head, beta)
    (found,) = torch.autograd.grad(stable, own)
    assert float(stable.detach()) == pytest.approx(float(experimental.detach()), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
