"""What each alignment adds to logit distillation at equal tokens: hidden states, attention relations, attention maps.

    python benchmarks/alignments.py [--tokens 12544] [--workers 2]

Depth 30 -> 24, evenly spaced, on the default data; the rest of the recipe is the hand-designed one without its grid.
Hidden states have the weight that the hand-designed recipe's sweep chose. The attention losses are about 2 at the
start, where the cross-entropy is about 5 and the gradients of all three are of one size, so that their weight is 1.
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
from autodistill.strategy import Alignment, Attention

HIDDEN = Alignment(layers="even", count=8, projection="linear", weight=10.0)
RELATIONS = Attention(kind="relations", relation_heads=12)
MAPS = Attention(kind="maps")
CASES: dict[str, tuple[Alignment | None, Attention | None]] = {
    "none": (None, None),
    "hidden states, even-8, linear": (HIDDEN, None),
    "relations, 12 heads": (None, RELATIONS),
    "maps": (None, MAPS),
    "hidden states and relations": (HIDDEN, RELATIONS),
}


def main() -> None:
    """Trains a student for each case and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12544)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    recipe = replace(load_strategy("hand_designed"), finishing=None)
    strategies = {
        name: replace(recipe, distillation=replace(recipe.distillation, alignment=alignment, attention=attention))
        for name, (alignment, attention) in CASES.items()
    }
    found = {one.name: one for one in trials.run(strategies, tokens=arguments.tokens, workers=arguments.workers)}
    lines = [
        [
            name,
            f"{found[name].accuracy:.4f} ± {found[name].stderr:.4f}",
            f"{found[name].perplexity:.2f}",
            f"{found[name].agreement:.3f}",
        ]
        for name in CASES
    ]
    titles = ["alignment", "accuracy", "perplexity", "agreement with the teacher"]
    print(
        report.write(
            "alignments",
            "What each alignment adds, at equal tokens",
            [
                f"SmolLM2-135M cut from 30 to 24 layers, {arguments.tokens:,} training tokens each, forward KL (0.25, "
                f"T 5 to 1) with cross-entropy, one seed, validation, {found['none'].deployment}.",
                report.table(titles, lines),
            ],
        )
    )


if __name__ == "__main__":
    main()
