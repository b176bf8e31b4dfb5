"""The example that tests of planning use: a model of 134M weights in ten minutes, on two workers of one thread."""

from __future__ import annotations

from autodistill.search.planning.durations import Demand, Speed
from autodistill.search.planning.placement import Workers

SPEED = Speed(cache=600.0, score=400.0, worker_train=180.0, worker_score=330.0)
WORKERS = Workers(count=2, threads=1, bf16=True, device="cpu")
DEMAND = Demand(
    box_seconds=600.0,
    spent_seconds=15.0,
    trials=None,
    tokens=None,
    baselines=1,
    teacher_deployments=8,
    deployments=8,
    train_tokens=90_000,
    validation_tokens=11_000,
    test_tokens=11_000,
    parameters=134_000_000,
    seed=0,
    ray=True,
)
