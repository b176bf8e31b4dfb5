"""How a smaller student of the 135M teacher begins, at 24,576 tokens on documents that it never saw.

    python benchmarks/student_init.py [--tokens 24576] [--recipes known ours hand_designed]

Depth 30 -> 22 by each choice of layers, and every layer with 70% of its FFN neurons (about the same number of weights).
The known recipe is forward KL at T = 1 from a cached top-64, AdamW at 3e-4, batches of 4 x 256 tokens, every weight
trained. Ours spends the same tokens in batches of one sequence, with the embedding table frozen, most of the logit loss
on the true tokens, and eight layers aligned to the teacher's states. The hand-designed recipe is the baseline of every
search.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import report
import trials

from autodistill.space import load_strategy
from autodistill.strategy import Alignment, Distillation, Init, Strategy

OURS = Distillation(
    divergence_weight=0.25, learning_rate=2e-4, alignment=Alignment(layers="even", count=8, weight=10.0)
)
RECIPES = {
    "known": (Strategy(distillation=Distillation(divergence_weight=1.0, train_embeddings=True)), 1024),
    "ours": (Strategy(distillation=OURS), 256),
    "hand_designed": (load_strategy("hand_designed"), 256),
}
# 22 of 30 layers, or 1088 of 1536 neurons.
INITS = {f"22 layers, {layers}": Init(depth=22 / 30, layers=layers) for layers in ("even", "contiguous", "influence")}
INITS["30 layers, FFN 70%"] = Init(depth=1.0, ffn=0.7)


def main() -> None:
    """Trains every student with every recipe and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    lines = []
    for title in arguments.recipes:
        recipe, batch = RECIPES[title]
        strategies = {f"{title}: {name}": replace(recipe, init=init) for name, init in INITS.items()}
        for one in trials.run(strategies, tokens=arguments.tokens, batch_tokens=batch, workers=arguments.workers):
            lines.append(
                [one.name, f"{one.perplexity:.2f}", f"{one.accuracy:.4f} ± {one.stderr:.4f}", f"{one.agreement:.3f}"]
            )
    titles = ["recipe and student", "perplexity", "accuracy", "agreement with the teacher"]
    print(
        report.write(
            "student-init",
            "How a smaller student begins, at equal tokens",
            [
                f"SmolLM2-135M, {arguments.tokens:,} training tokens each, one seed, validation documents that no "
                "training sequence shares; packed as the recipe finishes, or as 16-bit GGUF.",
                report.table(titles, sorted(lines)),
            ],
        )
    )


if __name__ == "__main__":
    main()
