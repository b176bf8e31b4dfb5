"""How a smaller student of the 135M teacher begins: constructions of about equal size, compared at equal tokens.

    python -m benchmarks.engine.student_init [--tokens 6144] [--seeds 5] [--recipe logits] [--workers 2] [--report]

The constructions are: 22 of 30 layers, by each choice of layers; every layer with 70% of its FFN neurons, with 6 of 9
heads and 85% of the neurons, or with two thirds of heads and channels; and 22 layers from scratch. In transformers'
Llama, no width between two thirds and the whole is divided by 9 or 6 heads and by a group of 64. The recipe "logits" is
`trials.LOGITS`. The recipe "narrow" is that of the named strategy, which also aligns eight layers to the teacher's
states. Each finished trial is a line of `reports/student-init.jsonl`. Existing lines are not trained again.
"""

from __future__ import annotations

from dataclasses import replace

from autodistill.strategy.named import load_strategy
from autodistill.strategy.strategy import Init, Strategy
from benchmarks.common import report, trials

STORE = "student-init.jsonl"
RECIPES = {"logits": trials.LOGITS, "narrow": load_strategy("narrow").distillation}
DEPTH = 22 / 30
BASE = "22 layers, even"
INITS = {
    f"22 layers, {layers}": Init(depth=DEPTH, layers=layers)
    for layers in ("even", "contiguous", "influence", "block-influence")
}
INITS |= {
    "30 layers, FFN 70%": Init(depth=1.0, ffn=0.7),
    "26 layers, influence, FFN 80%": Init(depth=26 / 30, layers="influence", ffn=0.8),
    "30 layers, 6 of 9 heads, FFN 85%": Init(depth=1.0, heads=2 / 3, ffn=0.85),
    "30 layers, 6 of 9 heads, two thirds of the width": Init(depth=1.0, heads=2 / 3, width=2 / 3),
    "22 layers, from scratch": Init(source="scratch", depth=DEPTH),
}


def main() -> None:
    """Train a student of each construction, and write the report of where they began and what they reached."""
    parser = trials.parser_of(__doc__)
    parser.add_argument("--recipe", choices=RECIPES, default="logits", help="see above")
    arguments = trials.parse(parser)
    recipe = RECIPES[arguments.recipe]
    strategies = {}
    for name, init in INITS.items():
        if init.width < 1 and recipe.alignment:
            continue  # states of another width need projections, which the recipe lacks
        scratch = init.source == "scratch"
        strategies[name] = Strategy(init=init, distillation=replace(recipe, train_embeddings=scratch))
    store, found = trials.study(arguments, STORE, strategies)
    said = trials.LOGITS_SAID if arguments.recipe == "logits" else 'the recipe of the named strategy "narrow"'
    print(
        report.write(
            "student-init",
            "How a smaller student begins, at equal tokens",
            [
                f"SmolLM2-135M, {arguments.tokens:,} training tokens each: {said}. {trials.judged(found)}",
                trials.table(found, BASE),
                trials.verdicts(found, BASE),
            ],
            store,
        )
    )


if __name__ == "__main__":
    main()
