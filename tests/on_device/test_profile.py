"""A traced step on a device that is not the CPU: every value that is read back is one that the step waited for."""

import json

from autodistill.profiling.trace import counted, record
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Strategy


def test_what_is_read_back_is_what_is_waited_for(workshop, device, traffic, tmp_path):
    trainer = workshop.trainer(Strategy(distillation=Distillation(divergence_weight=0.0)), device=device, tokens=64 * 8)
    steps = trainer.train_stable(64 * 5)
    found = record(lambda: next(steps), tmp_path / "trace.json", steps=2, device=device, name="step")
    waits = {line: count for line, count in traffic.waits.items() if line != "transformers"}
    # Five steps ran, and two of them were traced. Each waits for its losses and for the norm of its gradients.
    assert sum(waits.values()) == 10
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert counted(trace) == found.counts
    assert found.counts.read_back >= 2
    assert found.counts.operations > 100
