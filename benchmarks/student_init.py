"""Depth 30 -> 22: how a student begins and how its few steps are spent, at 24,576 tokens on documents it never saw.

    python benchmarks/student_init.py [--tokens 24576]

The known recipe is forward KL at T = 1 from a cached top-64, AdamW at 3e-4, batches of 4 x 256 tokens, every weight
trained. Ours spends the same tokens in batches of one sequence, with the embedding table frozen, most of the logit loss
on the true tokens, and eight layers aligned to the teacher's states.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import report
import trials

from autodistill.strategy import Alignment, Distillation, Init, Strategy

KNOWN = Distillation(divergence_weight=1.0, learning_rate=3e-4, train_embeddings=True)
OURS = Distillation(
    divergence_weight=0.25, learning_rate=2e-4, alignment=Alignment(layers="even", count=8, weight=10.0)
)


def main() -> None:
    """Trains the four students and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=24576)
    arguments = parser.parse_args()
    # 22 of 30 layers.
    inits = {layers: Init(depth=22 / 30, layers=layers) for layers in ("even", "contiguous")}
    lines = []
    for title, recipe, batch in (("known recipe, batch 1024", KNOWN, 1024), ("ours, batch 256", OURS, 256)):
        strategies = {
            f"{title}, {layers}": Strategy(init=init, distillation=replace(recipe)) for layers, init in inits.items()
        }
        for one in trials.run(strategies, tokens=arguments.tokens, batch_tokens=batch):
            lines.append(
                [one.name, f"{one.perplexity:.2f}", f"{one.accuracy:.4f} ± {one.stderr:.4f}", f"{one.agreement:.3f}"]
            )
    titles = ["recipe and layers kept", "perplexity", "accuracy", "agreement with the teacher"]
    print(
        report.write(
            "student-init",
            "How a 22-layer student begins, at equal tokens",
            [
                f"SmolLM2-135M cut from 30 to 22 layers, {arguments.tokens:,} training tokens each, one seed, "
                "validation documents that no training sequence shares, 16-bit GGUF.",
                report.table(titles, sorted(lines)),
            ],
        )
    )


if __name__ == "__main__":
    main()
