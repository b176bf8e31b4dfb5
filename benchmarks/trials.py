"""Trains named strategies straight to the end, side by side, on the default teacher and data; no search, no export."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from autodistill.records.store import RunFolder
from autodistill.search.prepare import Clock, Observer, plan_run, prepare_trials
from autodistill.search.request import SearchRequest, check_request
from autodistill.strategy import Strategy
from autodistill.trial import Trial, TrialSetting, TrialTask, Workbench, probe_deployment
from autodistill.units import Budget


@dataclass(frozen=True, kw_only=True)
class Result:
    """One trained strategy on validation, under the deployment it finishes on (or the widest)."""

    name: str
    seed: int
    deployment: str
    accuracy: float
    stderr: float
    perplexity: float
    agreement: float
    train_seconds: float


_bench: Workbench | None = None


def _open(setting: TrialSetting) -> None:
    global _bench
    _bench = Workbench(setting)


def _train(name: str, task: TrialTask) -> Result:
    assert _bench is not None
    report = Trial(_bench, task).run(len(_bench.setting.plan.rungs) - 1)
    evaluation = report.evaluation
    figures = evaluation.measurements
    return Result(
        name=name,
        seed=task.seed,
        deployment=evaluation.deployment.name,
        accuracy=figures["accuracy"].value,
        stderr=figures["accuracy"].stderr or float("nan"),
        perplexity=figures["perplexity"].value,
        agreement=figures["agreement"].value,
        train_seconds=report.seconds["train"],
    )


def run(
    strategies: Mapping[str, Strategy],
    *,
    tokens: int,
    seeds: tuple[int, ...] = (0,),
    workers: int = 2,
    batch_tokens: int | None = None,
    eval_tokens: int = 8192,
    teacher: str = "smollm2",
    data: str = "pydoc",
) -> list[Result]:
    """Trains every strategy with every seed; prints a line for each that ends.

    Args:
        strategies: By name.
        tokens: Training tokens of each.
        seeds: Of data order and projections.
        workers: Processes, each with an even share of the cores.
        batch_tokens: Tokens of an optimiser step; the search's own by default.
        eval_tokens: Validation tokens read.
        teacher, data: References.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = SearchRequest(
            budget=Budget(memory_bytes=16 * 10**9),
            teacher=teacher,
            data=data,
            trials=1,
            tokens=tokens,
            runner="inline",
            out=Path(folder),
            name="trials",
        )
        checked = check_request(request)
        # No teacher rows are wanted, and every state that one of the strategies aligns to.
        space = replace(checked.space, deployments=checked.space.deployments[:1], baselines=dict(strategies))
        deployments = checked.space.deployments
        checked = replace(checked, space=space)
        with RunFolder.create(request.out, checked.name) as run_folder:
            clock = Clock(time.monotonic(), lambda text: None)
            ready = prepare_trials(checked, plan_run(checked, run_folder, clock, Observer()), run_folder, clock)
            plan = ready.setting.plan
            plan = replace(plan, threads=max(1, plan.threads // workers))
            if batch_tokens:
                plan = replace(plan, batch_tokens=batch_tokens)
            setting = replace(ready.setting, plan=plan)
            results = []
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context, initializer=_open, initargs=(setting,)) as pool:
                futures = []
                for index, (name, strategy) in enumerate(strategies.items()):
                    probe = probe_deployment(strategy, deployments)
                    for seed in seeds:
                        task = TrialTask(
                            id=f"x{index:03d}-{seed}",
                            strategy=strategy,
                            seed=seed,
                            deployments=(probe,),
                            probe=probe,
                            straight=True,
                        )
                        futures.append(pool.submit(_train, name, task))
                for future in as_completed(futures):
                    result = future.result()
                    results.append(result)
                    print(
                        f"[{len(results)}/{len(futures)}] {result.name}: accuracy {result.accuracy:.4f}, "
                        f"perplexity {result.perplexity:.2f}, {result.train_seconds:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
            return results
