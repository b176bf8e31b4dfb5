"""The hand-designed recipe's learning rate and weights, chosen by a sweep at the tokens it is given in the main job.

    python benchmarks/baseline_sweep.py [--tokens 12288] [--seeds 1] [--time 30m]

Each candidate is trained straight to the end on the default data and judged on validation, on the grid that the recipe
finishes on. The best one's values are those of `search_spaces/strategies/hand_designed.yaml`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import report
import trials

from autodistill.space import load_strategy
from autodistill.strategy import Strategy

RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
DIVERGENCE_WEIGHTS = (0.5, 0.9)
ALIGNMENT_WEIGHTS = (0.1, 1.0)


def candidates() -> dict[str, Strategy]:
    """Variants of the recipe by name."""
    recipe = load_strategy("hand_designed")
    found = {}
    for rate, weight, alignment in itertools.product(RATES, DIVERGENCE_WEIGHTS, ALIGNMENT_WEIGHTS):
        assert recipe.distillation.alignment is not None
        distillation = replace(
            recipe.distillation,
            learning_rate=rate,
            divergence_weight=weight,
            alignment=replace(recipe.distillation.alignment, weight=alignment),
        )
        found[f"{rate:g} / {weight:g} / {alignment:g}"] = replace(recipe, distillation=distillation)
    return found


def main() -> None:
    """Runs the sweep, shows progress and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    results = trials.run(candidates(), tokens=arguments.tokens, workers=arguments.workers)
    ranked = sorted(results, key=lambda one: -one.accuracy)
    lines = [
        [one.name, f"{one.accuracy:.4f} ± {one.stderr:.4f}", f"{one.perplexity:.2f}", f"{one.agreement:.3f}"]
        for one in ranked
    ]
    text = (
        f"{len(results)} variants, {arguments.tokens:,} tokens each, one seed, judged on validation "
        f"as {ranked[0].deployment}.\n\n"
    )
    titles = ["rate / divergence weight / alignment weight", "accuracy", "perplexity", "agreement"]
    print(report.write("baseline-sweep", "Sweep of the hand-designed recipe", [text + report.table(titles, lines)]))


if __name__ == "__main__":
    main()
