"""From how many tokens for each weight on is it better to train weights than the scales of their codes?

    python -m benchmarks.search.weights_or_scales [--tokens 25k 200k] [--seeds 1]

The small language model in Q4_0 learns PostgreSQL's manual in steps of two sequences on one core. Half of the loss is
its teacher's. It is trained through the scales of its codes alone, or through its weights at some rates, with or
without its table. Weights are on the grid in the last steps. Three texts are read: pages of the manual that no arm saw,
documents of the kind that the teacher was trained on, and a text of neither kind. Measurements are kept, and the same
command continues.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from autodistill.distillation.student.check import student_spec
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.search.worker.begin import initial_student
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import trainer_of
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import WHOLE, Finishing, Strategy
from autodistill.utils.hashing import content_hash
from benchmarks.common import program, report, trials
from benchmarks.search.forgetting import LENGTH, READ, SEQUENCES, Texts, read, subject, texts_of
from benchmarks.search.small_teacher import described

_SIZE = SEQUENCES * LENGTH
_DECAY = 0.3
_STORED = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)


def _strategy(rate: float, scales: str, *, table: bool = True) -> Strategy:
    recipe = Distillation(
        divergence_weight=0.5, signal="online", signal_tokens=0, learning_rate=rate, train_embeddings=table
    )
    finishing = Finishing(format="gguf-q4_0", bits=4, group_size=32, scales=scales)
    return Strategy(init=WHOLE, distillation=recipe, finishing=finishing)


ARMS = {
    "scales alone, 6e-4": _strategy(6e-4, "alone"),
    "weights, 1e-4": _strategy(1e-4, "absmax"),
    "weights, 3e-4": _strategy(3e-4, "absmax"),
    "weights, 1e-3": _strategy(1e-3, "absmax"),
    "weights without the table, 3e-4": _strategy(3e-4, "absmax", table=False),
}


def trained(setting: TrialSetting, texts: Texts, strategy: Strategy, seed: int) -> dict[str, Any]:
    """Train one arm. Return its figures for each text, with the weights as its runtime holds them."""
    spec = student_spec(strategy, setting.teacher_spec)
    task = TrialTask(id="x", strategy=strategy, seed=seed, deployments=(_STORED,), probe=_STORED)
    model, kept = initial_student(setting, strategy.init, seed)
    trainer = trainer_of(Workbench(setting), task, model, kept)
    plan = setting.plan
    for _ in trainer.train_stable(branch_point(plan.tokens, _DECAY, plan.batch_tokens)):
        pass
    for _ in trainer.finish(plan.tokens, spec):
        pass
    return _read(model, texts, strategy, setting, trainer.scales)


def untrained(setting: TrialSetting, texts: Texts) -> dict[str, Any]:
    """Return the figures of the teacher, stored as the students are."""
    strategy = ARMS["weights, 3e-4"]
    return _read(initial_student(setting, WHOLE, 0)[0], texts, strategy, setting, {})


def _read(
    model: Any, texts: Texts, strategy: Strategy, setting: TrialSetting, scales: dict[str, Any]
) -> dict[str, Any]:
    with deployed_weights(model, student_spec(strategy, setting.teacher_spec), _STORED, scales or None):
        return read(model, texts)


def main() -> None:
    """Train every arm at every length, and write the report of what each learned and forgot."""
    parser = program.parser_of(__doc__, seeds=1)
    parser.add_argument("--tokens", type=program.token_count, nargs="+", default=[25_000, 200_000])
    parser.add_argument("--eval-tokens", type=program.token_count, default=16384)
    arguments = program.parse(parser, tokens=[8 * _SIZE], eval_tokens=4 * LENGTH)
    torch.set_num_threads(1)
    teacher, folders = subject(arguments.smoke)
    texts = texts_of(teacher, folders, arguments.eval_tokens)
    kept = report.Kept("weights-or-scales", content_hash([teacher.name, arguments.eval_tokens]))
    lines = []
    for tokens in arguments.tokens:
        whole, data = tokens // _SIZE * _SIZE, str(folders["train"])
        request = trials.request_of(str(teacher), data, tokens=whole, step_tokens=_SIZE, context=LENGTH, length=LENGTH)
        with trials.ready(request, ARMS, 1, LENGTH) as (setting, _):
            plan = replace(setting.plan, threads=1, micro_batch=SEQUENCES, warmup_tokens=min(16 * _SIZE, tokens // 4))
            setting = replace(setting, plan=plan)
            begun = kept.get("untrained", partial(untrained, setting, texts))
            weights = setting.teacher_spec.parameters
            for name, strategy in ARMS.items():
                found = []
                for seed in range(arguments.seeds):
                    print(f"{tokens:,} tokens, seed {seed}: {name}", file=sys.stderr, flush=True)
                    make = partial(trained, setting, texts, strategy, seed)
                    found.append(kept.get(f"{tokens} tokens, {name}, seed {seed}", make))
                lines.append([f"{tokens:,} ({tokens / weights:.3f})", name, *(_cell(found, text) for text in READ)])
    lines.insert(0, ["none", "untrained", *(_cell([begun], text) for text in READ)])
    print(
        report.write(
            "weights-or-scales",
            "Weights, or the scales of their codes?",
            [
                f"{described(teacher)}, PostgreSQL's manual, {arguments.seeds} seed(s), {arguments.eval_tokens:,} "
                "tokens of each text read. Nats a token, means of the seeds, with the KL from the teacher in brackets.",
                report.table(
                    ["tokens (a weight)", "trained", "unseen pages", "the teacher's own kind", "neither"], lines
                ),
            ],
        )
    )


def _cell(some: list[dict[str, Any]], text: str) -> str:
    nll, kl = (float(np.mean([one[text][figure][0] for one in some])) for figure in ("nll", "kl"))
    return f"{nll:.4f} ({kl:.4f})"


if __name__ == "__main__":
    main()
