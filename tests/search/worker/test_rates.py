"""A range test as a worker's piece of work, on a tiny teacher."""

from types import SimpleNamespace

import pytest

from autodistill.distillation.student.check import probe_deployment
from autodistill.search.prior.tried_rates import RangeTest
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialTask
from autodistill.search.worker.rates import try_rates
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Alignment, Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy

Q8_0 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)


def test_a_worker_tests_the_rates_of_a_student(lab, tmp_path):
    strategy = Strategy(
        init=Init(depth=0.5),
        distillation=Distillation(learning_rate=3e-3, alignment=Alignment(layers="even", count=2)),
        finishing=Finishing(format="gguf-q8_0", bits=8, group_size=32),
    )
    probe = probe_deployment(strategy, (Q8_0,))
    task = TrialTask(id="t000", strategy=strategy, seed=0, deployments=(probe,), probe=probe)
    bench = Workbench(lab.setting(tmp_path))
    found = try_rates(bench, task, horizon=20, tokens=512, steps=4)
    assert found.tried[0].rate == 3e-3
    assert found.beats_beginning
    assert RangeTest.from_json(found.to_json()) == found
    # No student is left on disk.
    assert list(tmp_path.rglob("*.safetensors")) == []
    bench.sharding = SimpleNamespace(count=2)
    with pytest.raises(ValueError, match="in one process"):
        try_rates(bench, task, horizon=20, tokens=512)
