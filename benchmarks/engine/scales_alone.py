"""What should be trained on a grid: the weights, which are rounded at the end, or only the scales of their codes?

    python -m benchmarks.engine.scales_alone [--data REF] [--tokens 24576] [--seeds 2] [--eval-tokens 16384]

The students are SmolLM2 as its own file stores it (Q4_1, table included). Each is trained on a text's labels from the
same beginning, in steps of one sequence, and judged on held-out text with the weights as the runtime holds them. The
first arm is on no grid, neither in training nor when judged. It shows what a grid may cost. Two arms learn from the
teacher in addition to the labels. Measurements are kept, and the same command continues them. For speed, see
`side_by_side`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from autodistill.distillation.student.check import student_spec
from autodistill.search.prior.range_test import HeldOut
from autodistill.search.prior.tried_rates import paired
from autodistill.search.request.request import SearchRequest
from autodistill.search.worker.begin import initial_student
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import trainer_of
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.utils.hashing import content_hash
from benchmarks.common import program, report, trials

LENGTH = 256
_GRID: Mapping[str, Any] = {"format": "gguf-q4_1", "bits": 4, "group_size": 32, "symmetric": False}
_WHOLE = Deployment(format="gguf-f16", bits=16, group_size=0, runtime="llama.cpp")
PACKED = Deployment(**_GRID, runtime="llama.cpp")
RATE = 4.4e-5  # the prior's rate for as many steps of one sequence


# The prior's share for the teacher. Each step computes the whole divergence.
_TAUGHT: Mapping[str, Any] = {"divergence_weight": 0.444, "signal": "online", "signal_tokens": 0}


def _strategy(rate: float, scales: str | None, **teaching: Any) -> Strategy:
    known = {"divergence_weight": 0.0, "learning_rate": rate, "train_embeddings": True}
    recipe = Distillation(**{**known, **teaching})
    finishing = None if scales is None else Finishing(**_GRID, scales=scales)
    return Strategy(init=Init(depth=1.0), distillation=recipe, finishing=finishing)


ARMS = {
    "all weights in 16 bits": _strategy(RATE, None),
    "weights, on the grid at the end": _strategy(RATE, "absmax"),
    "the same at four times the rate": _strategy(4 * RATE, "absmax"),
    "scales alone": _strategy(RATE, "alone"),
    "scales alone, by the teacher too": _strategy(RATE, "alone", **_TAUGHT),
    "the same, less and less": _strategy(RATE, "alone", **_TAUGHT, final_divergence_weight=0.0),
}
BASE = "weights, on the grid at the end"


def trained(setting: TrialSetting, name: str, seed: int, eval_tokens: int) -> dict[str, Any]:
    """Train one arm, and score it before and after.

    Returns:
        Tokens of each held-out document, and its nats before and after.
    """
    strategy = ARMS[name]
    bench = Workbench(setting)
    plan = setting.plan
    spec = student_spec(strategy, setting.teacher_spec)
    deployment = _WHOLE if strategy.finishing is None else PACKED
    task = TrialTask(id="x", strategy=strategy, seed=seed, deployments=(deployment,), probe=deployment)
    model, kept = initial_student(setting, strategy.init, seed)
    held = HeldOut(model, spec, bench.held_out(eval_tokens)[0], deployment, setting.device)
    before = held.sums(None)
    trainer = trainer_of(bench, task, model, kept)
    for steps in (
        trainer.train_stable(plan.tokens - plan.tokens // 5 // LENGTH * LENGTH),
        trainer.finish(plan.tokens, spec),
    ):
        for _ in steps:
            pass
    after = held.sums(trainer.scales or None)
    return {"counts": held.counts, "before": before, "after": after}


def request_of(arguments: argparse.Namespace, tokens: int, step_tokens: int) -> SearchRequest:
    """Return the request for trainings of this many tokens: of SmolLM2, or of the tiny teacher in a smoke run."""
    inputs = {"teacher": "smollm2", "data": arguments.data}
    if arguments.smoke:
        inputs = trials.small_inputs()
    return trials.request_of(
        inputs["teacher"], inputs["data"], tokens=tokens, step_tokens=step_tokens, context=LENGTH, length=LENGTH
    )


def main() -> None:
    """Train weights and scales at equal tokens, and write the report of what each reached."""
    parser = program.parser_of(__doc__, seeds=2)
    parser.add_argument("--data", default="pydoc", help="text that is trained on")
    parser.add_argument("--tokens", type=program.token_count, default=24576)
    parser.add_argument("--eval-tokens", type=program.token_count, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    arguments = program.parse(parser, tokens=8 * LENGTH, eval_tokens=4 * LENGTH, seeds=1, threads=1)
    request = request_of(arguments, arguments.tokens, LENGTH)
    teacher, data = str(request.teacher), str(request.data)
    source = content_hash([teacher, data, arguments.tokens, arguments.eval_tokens])
    kept = report.Kept("scales-alone", source)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    with trials.ready(request, ARMS, 1, arguments.eval_tokens) as (setting, _):
        plan = replace(setting.plan, threads=arguments.threads, micro_batch=1, warmup_tokens=8 * LENGTH)
        setting = replace(setting, plan=plan)
        for seed in range(arguments.seeds):
            for name in ARMS:
                print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
                make = partial(trained, setting, name, seed, arguments.eval_tokens)
                found[name].append(kept.get(f"{name}, seed {seed}", make))
    report.note("trainings", found)
    print(
        report.write(
            "scales-alone",
            "What is trained of weights on a grid",
            [
                f"{teacher}, the text {data.rpartition('/')[2]}, {arguments.tokens:,} training tokens in steps of "
                f"{LENGTH}, {arguments.seeds} seeds; of the last two arms the teacher has 0.444 of the "
                "loss. Nats a held-out token, before and after; the "
                "differences are paired by document, with the mean of the seeds' standard errors.",
                report.table(
                    ["trained", "before", "after", "gain", f'against "{BASE}"'],
                    [_line(name, found) for name in ARMS],
                ),
            ],
        )
    )


def _line(name: str, found: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    def mean(key: str) -> float:
        return float(np.mean([sum(one[key]) / sum(one["counts"]) for one in found[name]]))

    def difference(before: list[Any], after: list[Any]) -> str:
        pairs = [paired(one["counts"], *both) for one, *both in zip(found[name], before, after, strict=True)]
        gains, errors = zip(*pairs, strict=True)
        return f"{np.mean(gains):.4f} ± {np.mean([error or 0.0 for error in errors]):.4f}"

    before, after = ([one[key] for one in found[name]] for key in ("before", "after"))
    base = [one["after"] for one in found[BASE]]
    against = "" if name == BASE else difference(base, after)
    return [name, f"{mean('before'):.4f}", f"{mean('after'):.4f}", difference(before, after), against]


if __name__ == "__main__":
    main()
