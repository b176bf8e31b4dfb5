"""The gain of each alignment over logit distillation at equal tokens: hidden states, attention relations and maps.

    python -m benchmarks.engine.alignments [--tokens 6144] [--seeds 5] [--workers 2] [--report]

Students are cut from 30 to 24 layers, evenly spaced, on the default data. The rest of the recipe is `trials.LOGITS`.
Hidden states have the weight that the hand-designed recipe's sweep chose. The attention losses are about 2 at the
start, when the cross-entropy is about 5, and the gradients of all three have about the same size. So their weight is 1.
Each finished trial is a line of `reports/alignments.jsonl`. Existing lines are not trained again. The guide's full
recipe is included as it is named, except its finishing, with its own temperatures.
"""

from __future__ import annotations

from dataclasses import replace

from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Alignment, Attention
from autodistill.strategy.strategy import Init, Strategy
from benchmarks.common import report, trials

STORE = "alignments.jsonl"
HIDDEN = Alignment(layers="even", count=8, weight=10.0)
PROJECTED = replace(HIDDEN, projection="linear")
RANK = 64
RELATIONS = Attention(kind="relations", relation_heads=12)
MAPS = Attention(kind="maps")
BASE, FULL = "logits alone", "full_recipe"
CASES: dict[str, tuple[Alignment | None, Attention | None]] = {
    BASE: (None, None),
    "hidden states of 8 layers": (HIDDEN, None),
    "hidden states of 8 layers, linear projections": (PROJECTED, None),
    f"hidden states of 8 layers, projections of rank {RANK}": (replace(HIDDEN, projection="low-rank", rank=RANK), None),
    "hidden states of 8 layers, MLPs": (replace(HIDDEN, projection="mlp"), None),
    "hidden states of 8 layers, L2": (replace(HIDDEN, distance="l2"), None),
    "hidden states of 8 layers, balanced": (replace(HIDDEN, weight=1.0, balance=True), None),
    "hidden states of the last 8 layers": (replace(HIDDEN, layers="last"), None),
    "hidden states of the last layer": (replace(HIDDEN, layers="last", count=1), None),
    "hidden states of all layers": (replace(HIDDEN, layers="all", count=1), None),
    "relations, 12 heads": (None, RELATIONS),
    "maps": (None, MAPS),
    "hidden states of 8 layers and maps": (HIDDEN, MAPS),
}


def main() -> None:
    """Train a student with each alignment and seed, and write the report of what they reached."""
    arguments = trials.parse(trials.parser_of(__doc__))
    strategies = {
        name: Strategy(
            init=Init(depth=0.8), distillation=replace(trials.LOGITS, alignment=alignment, attention=attention)
        )
        for name, (alignment, attention) in CASES.items()
    }
    whole = load_strategy(FULL)
    strategies[f'the named strategy "{FULL}"'] = Strategy(init=Init(depth=0.8), distillation=whole.distillation)
    store, found = trials.study(arguments, STORE, strategies)
    print(
        report.write(
            "alignments",
            "What each alignment adds, at equal tokens",
            [
                f"SmolLM2-135M cut from 30 to 24 layers, {arguments.tokens:,} training tokens each: "
                f"{trials.LOGITS_SAID}. {trials.judged(found)}",
                trials.table(found, BASE),
                trials.verdicts(found, BASE),
            ],
            store,
        )
    )


if __name__ == "__main__":
    main()
