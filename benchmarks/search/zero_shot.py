"""Does the loss of an untrained construction predict its value after a short distillation?

    python -m benchmarks.search.zero_shot [--large] [--tokens 6144] [--storages q4_0,q3_k] [--time 20m]

The program makes twenty-six students of the small language model: whole, or with fewer layers, FFN neurons or heads,
each in several storages. For each it measures the KL to the teacher at the beginning, and NLL and accuracy after the
same number of tokens. It reports Kendall's tau between both orders, over all pairs, over pairs within 0.3 nats, within
and between families. It also reports the regret of choosing the lowest KL among the students that fit a budget. Trained
students are not trained again; `--tokens` may be changed. `--storages` and `--bf16` make long trainings shorter.

With `--large` the teacher is SmolLM2-135M with its channels in another order, which puts its weights off the grid of
its file. Eight shapes have each the most bits with which they fit what the whole teacher takes in its smallest type.
Each is read after `--tokens` and after 51,200 tokens of one training, each time after a decay of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.distillation.student.check import student_spec
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.estimates.serving_memory import memory
from autodistill.hardware.budget import Budget
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.spec import ModelSpec
from autodistill.options import cache_folder
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Init, Strategy
from autodistill.utils.hashing import content_hash
from benchmarks.common import debian_texts, report
from benchmarks.common.program import parse, parser_of, tiny_data, tiny_teacher, token_count
from benchmarks.common.reordered import reordered
from benchmarks.common.report import Kept
from benchmarks.search.constructions import Construction, Lab
from benchmarks.search.small_teacher import described, small_teacher

CONTEXT, HELD_OUT, NEAR = 512, 8192, 0.3
# Shares of the whole teacher's weights and cache in Q4_0 with an 8-bit cache.
BUDGETS = (1.0, 0.8, 0.65)
# Shapes by family, with their storages.
SHAPES: Sequence[tuple[str, str, Init, tuple[str, ...]]] = (
    ("whole", "whole", Init(depth=1.0), ("q8_0", "q5_0", "q4_0", "q3_k", "q2_k")),
    ("FFN 75%", "narrow", Init(depth=1.0, ffn=0.75), ("q8_0", "q5_0", "q4_0")),
    ("FFN 50%", "narrow", Init(depth=1.0, ffn=0.5), ("q8_0", "q5_0", "q4_0", "q3_k", "q2_k")),
    ("FFN 25%", "narrow", Init(depth=1.0, ffn=0.25), ("q8_0", "q5_0", "q4_0")),
    ("2 layers, even", "shallow", Init(depth=0.67), ("q8_0", "q4_0", "q3_k")),
    ("1 layer", "shallow", Init(depth=0.34), ("q8_0", "q4_0")),
    ("half of the heads", "heads", Init(depth=1.0, heads=0.5), ("q8_0", "q4_0", "q3_k")),
    ("2 layers, FFN 50%", "both", Init(depth=0.67, ffn=0.5), ("q8_0", "q4_0", "q3_k")),
)
# Shapes of the large teacher, all within one budget. Its rows are no whole super-blocks, so K-quants are left out.
LARGE_SHAPES: Sequence[tuple[str, str, Init]] = (
    ("whole", "whole", Init(depth=1.0)),
    ("FFN 88%", "narrow", Init(depth=1.0, ffn=0.875)),
    ("FFN 75%", "narrow", Init(depth=1.0, ffn=0.75)),
    ("FFN 50%", "narrow", Init(depth=1.0, ffn=0.5)),
    ("27 layers", "shallow", Init(depth=0.9)),
    ("24 layers", "shallow", Init(depth=0.8)),
    ("20 layers", "shallow", Init(depth=0.667)),
    ("24 layers, FFN 75%", "both", Init(depth=0.8, ffn=0.75)),
)
LARGE_KINDS, LARGE_TOKENS, LARGE_HELD_OUT = ("q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "mxfp4"), 51_200, 4096


def constructions(
    spec: ModelSpec, shapes: Sequence[tuple[str, str, Init, tuple[str, ...]]] = SHAPES
) -> Iterator[tuple[Construction, int]]:
    """Yield the students with the bytes of weights and cache.

    Storages whose blocks do not divide the rows are left out.
    """
    for name, family, init, kinds in shapes:
        cut = student_spec(Strategy(init=init), spec)
        options = Options(spec=cut, budget=Budget(memory_bytes=1, context=CONTEXT))
        tensors = options.matrices | options.tables
        for kind in kinds:
            if all(kind in options.kinds(tensor) for tensor in tensors.values()):
                deployment = options.deployment(dict.fromkeys(tensors, kind), ("q8_0", "q8_0"))
                one = Construction(name=f"{name}, {kind}", family=family, init=init, deployment=deployment)
                yield one, _size(cut, deployment)


def in_one_budget(spec: ModelSpec) -> Iterator[tuple[Construction, int]]:
    """Yield each large shape in its widest type that fits what the whole teacher takes in the smallest one."""
    shapes = [(*shape, LARGE_KINDS) for shape in LARGE_SHAPES]
    limit = min(size for one, size in constructions(spec, shapes[:1]))
    for shape in shapes:
        yield next((one, size) for one, size in constructions(spec, [shape]) if size <= limit)


def _size(spec: ModelSpec, deployment: Deployment) -> int:
    need = memory(spec, deployment, context=CONTEXT, batch=1)
    return need.weights_bytes + need.kv_cache_bytes


def tau(pairs: Sequence[tuple[float, float]]) -> tuple[float, int]:
    """Return Kendall's tau-a of pairs of differences, and the number of pairs. Tau is NaN if there are none."""
    signs = [np.sign(first) * np.sign(second) for first, second in pairs]
    return (float(np.mean(signs)) if signs else float("nan")), len(signs)


def orders(found: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """Return tau of the KL before and the NLL after training, for pairs of several kinds."""
    kinds: dict[str, list[tuple[float, float]]] = {
        "all pairs": [],
        f"within {NEAR} nats of KL": [],
        "within a family": [],
        "between families": [],
        f"between families, within {NEAR} nats": [],
    }
    for one, other in combinations(found, 2):
        gap = one["kl"] - other["kl"], one["nll"] - other["nll"]
        near, same = abs(gap[0]) <= NEAR, one["family"] == other["family"]
        wanted = (True, near, same, not same, near and not same)
        for kind, holds in zip(kinds, wanted, strict=True):
            if holds:
                kinds[kind].append(gap)
    return {kind: tau(pairs) for kind, pairs in kinds.items()}


def regret(found: Sequence[Mapping[str, Any]], limit: float) -> dict[str, Any] | None:
    """Return what choosing the lowest KL within a size limit loses in nats and points against the best choice."""
    fitting = [one for one in found if one["bytes"] <= limit]
    if len(fitting) < 2:
        return None
    chosen = min(fitting, key=lambda one: float(one["kl"]))
    best = min(fitting, key=lambda one: float(one["nll"]))
    most = max(float(one["accuracy"]) for one in fitting)
    return {
        "fitting": len(fitting),
        "chosen": chosen["name"],
        "best": best["name"],
        "nats": chosen["nll"] - best["nll"],
        "points": 100 * (most - chosen["accuracy"]),
    }


def sections(found: Sequence[Mapping[str, Any]], limits: Mapping[float, int], told: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of the report."""
    yield (
        f"Students of {told['teacher']}, text {told['data']}: KL to the teacher, NLL and accuracy on "
        f"{told['held_out']:,} held-out tokens; each student trained on {told['tokens']:,} tokens (forward KL from the "
        "live teacher 0.25, rate by width, the last fifth on the grid of its storage), seed 0. The teacher itself: "
        f"NLL {told['teacher_nll']:.4f}."
    )
    rows = [
        [one["name"], f"{one['bytes'] / 1e6:.3f}", f"{one['kl']:.4f}", f"{one['before']:.4f}", f"{one['nll']:.4f}",
         f"{100 * one['accuracy']:.2f}"]
        for one in sorted(found, key=lambda one: float(one["kl"]))
    ]  # fmt: skip
    titles = ["student", "MB of weights and cache", "KL untrained", "NLL untrained", "NLL after", "accuracy after, %"]
    yield report.table(titles, rows)
    lines = [[kind, f"{value:+.3f}", count] for kind, (value, count) in orders(found).items()]
    yield "Kendall's tau between KL untrained and NLL after:\n\n" + report.table(["pairs", "tau", "number"], lines)
    lines = []
    for share, limit in limits.items():
        one = regret(found, limit)
        if one is not None:
            lines.append(
                [f"{share:g}", one["fitting"], one["chosen"], one["best"], f"{one['nats']:.4f}", f"{one['points']:.2f}"]
            )
    yield "Regret of the zero-shot choice among what fits:\n\n" + report.table(
        ["budget", "fit", "chosen by KL", "best after", "nats", "points"], lines
    )
    (value, _), regrets = orders(found)["all pairs"], [regret(found, limit) for limit in limits.values()]
    worst = max((one["points"] for one in regrets if one is not None), default=0.0)
    held = value >= 0.7 and worst <= 1.0
    yield (
        f"The kill test asks for a tau of .7 and a regret of at most a point: **{'held' if held else 'not held'}** "
        f"(tau {value:.3f}, worst regret {worst:.2f} points)."
    )


def main() -> None:
    """Measure and train each construction, and write the report of how the two orders agree."""
    parser = parser_of(__doc__, time=True)
    parser.add_argument("--large", action="store_true", help="students of SmolLM2-135M, after two lengths of training")
    parser.add_argument("--tokens", type=token_count, default=6144, help="that each student is trained on")
    parser.add_argument("--storages", type=_names, help="q4_0,q3_k for students of these only")
    parser.add_argument("--bf16", action="store_true", help="train with products in bfloat16, as --large does")
    parser.add_argument("--data", help="the held-apart manuals by default")
    parser.add_argument("--teacher-tokens", type=token_count, help="of the small teacher; the newest by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parse(parser, tokens=1024)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    held_out, step, longest = (LARGE_HELD_OUT if arguments.large else HELD_OUT), 512, LARGE_TOKENS
    if arguments.smoke:
        teacher = Path(tiny_teacher(layers=3, width=256, heads=4, ffn=512))
        arguments.data, held_out, longest = tiny_data(60), 512, 2048
    elif arguments.large:
        teacher = reordered(materialize(resolve_teacher("smollm2"), cache_folder()).folder)
    else:
        teacher = small_teacher(arguments.teacher_tokens)
    data = arguments.data or str(debian_texts.debian_texts().folder / "manuals")
    bf16 = arguments.large or arguments.bf16
    lab = Lab(teacher, data, held_out=held_out, step=step, bf16=bf16)
    settings = [held_out, step, arguments.large, *["bf16"] * arguments.bf16]
    source = content_hash([teacher.name, teacher.parent.name, lab.fingerprint, *settings])
    kept = Kept("zero-shot", source, arguments.time)
    itself = kept.get("teacher", lab.teacher_itself)
    told = {
        "teacher": "SmolLM2-135M, reordered" if arguments.large else described(teacher),
        "data": Path(data).name,
        "held_out": held_out,
        "teacher_nll": itself["nll"],
    }
    lengths = (arguments.tokens, longest) if arguments.large else (arguments.tokens,)
    found = measured(lab, kept, lengths, arguments)
    parts: list[str] = []
    for tokens in lengths:
        these = [one | one["after"][str(tokens)] for one in found]
        if arguments.large:
            limits = {1.0: max(int(one["bytes"]) for one in these)}
        else:
            whole = next(one["bytes"] for one in these if one["name"] == "whole, q4_0")
            limits = {share: int(share * whole) for share in BUDGETS}
        parts += sections(these, limits, told | {"tokens": tokens})
    name = "zero-shot-large" if arguments.large else f"zero-shot-{arguments.tokens}"
    title = "What a construction loses untrained, and what it is worth after a short distillation"
    made_by = f"-m benchmarks.search.zero_shot {'--large ' * arguments.large}--tokens {arguments.tokens}"
    made_by += " --bf16" * arguments.bf16
    if arguments.storages is not None:
        made_by += f" --storages {','.join(arguments.storages)}"
    print(report.write(name, title, parts, made_by=made_by))


def measured(lab: Lab, kept: Kept, lengths: Sequence[int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return each student with its bytes, its loss untrained, and its figures "after" each number of tokens."""
    found = []
    chosen = list(in_one_budget(lab.spec) if arguments.large else constructions(lab.spec))
    if arguments.storages is not None:
        chosen = [(one, size) for one, size in chosen if one.name.rpartition(", ")[2] in arguments.storages]
    for one, size in chosen[:3] if arguments.smoke else chosen:
        before = kept.get(f"{one.name}, untrained", lambda one=one: _short(lab.untrained(one)))
        after = kept.get(
            f"{one.name}, {'+'.join(map(str, lengths))}",
            lambda one=one: {
                str(tokens): _short(figures) for tokens, figures in lab.trained_along(one, lengths, seed=0).items()
            },
        )
        row = {"name": one.name, "family": one.family, "bytes": size, "kl": before["kl"], "before": before["nll"]}
        found.append(row | {"after": {key: {"nll": v["nll"], "accuracy": v["accuracy"]} for key, v in after.items()}})
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures without the sums by document, because nothing is paired here."""
    return {name: value for name, value in found.items() if not name.endswith("_sums") and name != "count"}


if __name__ == "__main__":
    main()
