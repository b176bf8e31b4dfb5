"""How fast is training if only scales are trained: by threads, by processes, and with which loops?

    python -m benchmarks.engine.side_by_side [--data REF] [--steps 8]

The student is SmolLM2 as its own file stores it (Q4_1), trained on a text's labels in steps of two sequences. All ways
are timed one after another in one run, and a second time in reverse order, as the machine's speed may change.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import numpy as np
import torch

from autodistill.distillation.training import trained_scales
from autodistill.search.worker.begin import initial_student
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import trainer_of
from benchmarks.common import program, report, trials
from benchmarks.engine.scales_alone import ARMS, LENGTH, PACKED, request_of

SEQUENCES = 2
# Threads of each process, number of processes, and whether loops are compiled.
WAYS = {
    "one thread": (1, 1, True),
    "two threads, operation by operation": (2, 1, False),
    "two threads": (2, 1, True),
    "two processes, operation by operation": (2, 2, False),
    "two processes": (2, 2, True),
}
BASE = "two threads, operation by operation"


def rate(setting: TrialSetting, way: str, steps: int) -> float:
    """Return the tokens per second of the median step, without the first two."""
    threads, processes, compiled = WAYS[way]
    strategy = ARMS["scales alone"]
    task = TrialTask(id="x", strategy=strategy, seed=0, deployments=(PACKED,), probe=PACKED)
    torch.set_num_threads(threads)
    loops = trained_scales.loops
    if not compiled:
        trained_scales.loops = lambda *_: None
    try:
        model, kept = initial_student(setting, strategy.init, 0)
        trainer = trainer_of(Workbench(setting), task, model, kept, side_by_side=processes)
        records = list(trainer.train_stable((2 + steps) * SEQUENCES * LENGTH))
        trainer.close()
    finally:
        trained_scales.loops = loops
    return float(np.median([record.tokens_per_second for record in records[2:]]))


def main() -> None:
    """Time the training of scales in each way, and write the report of tokens a second."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--data", default="pydoc", help="text that is trained on")
    parser.add_argument("--steps", type=int, default=8)
    arguments = program.parse(parser, steps=2)
    size = SEQUENCES * LENGTH
    request = request_of(arguments, 2 * (2 + arguments.steps) * size, size)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    load = os.getloadavg()[0]
    with trials.ready(request, {"scales alone": ARMS["scales alone"]}, 1, LENGTH) as (setting, _):
        plan = replace(setting.plan, micro_batch=1, batch_tokens=size)
        setting = replace(setting, plan=plan)
        for way in (*WAYS, *reversed(WAYS)):
            print(way, file=sys.stderr, flush=True)
            found[way].append(rate(setting, way, arguments.steps))
    report.note("tokens a second", found)
    base = np.mean(found[BASE])
    lines = [[way, *(f"{one:.0f}" for one in rates), f"{np.mean(rates) / base:.2f}"] for way, rates in found.items()]
    print(
        report.write(
            "side-by-side",
            "Training of scales, by threads and by processes",
            [
                f"{request.teacher}, steps of {SEQUENCES} sequences of {LENGTH} tokens, labels alone, medians of "
                f"{arguments.steps} steps; the load of the machine before was {load:.1f}.",
                report.table(["way", "first", "second", f'ratio to "{BASE}"'], lines),
            ],
        )
    )


if __name__ == "__main__":
    main()
