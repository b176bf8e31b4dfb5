"""The hand-designed recipe's learning rate and weights, chosen by a sweep at the tokens it is given in the main job.

    python benchmarks/baseline_sweep.py [--tokens 12544] [--rates 1e-4 2e-4] [--divergence 0.5] [--alignment 1]

Each candidate is trained straight to the end on the default data and judged on validation, on the grid that the recipe
finishes on. What was trained before is kept beside the report and not trained again. The best one's values are those of
`search_spaces/strategies/hand_designed.yaml`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import report
import trials

from autodistill.strategy.named import load_strategy
from autodistill.strategy.strategy import Strategy

RATES = (1e-4, 2e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
DIVERGENCE_WEIGHTS = (0.5, 0.9)
ALIGNMENT_WEIGHTS = (0.1, 1.0)
STORE = report.REPORTS / "baseline-sweep.json"


def candidates(rates: list[float], divergence: list[float], alignment: list[float]) -> dict[str, Strategy]:
    """Variants of the recipe by name."""
    recipe = load_strategy("hand_designed")
    assert recipe.distillation.alignment is not None
    found = {}
    for rate, weight, pull in itertools.product(rates, divergence, alignment):
        distillation = replace(
            recipe.distillation,
            learning_rate=rate,
            divergence_weight=weight,
            alignment=replace(recipe.distillation.alignment, weight=pull),
        )
        found[f"{rate:g} / {weight:g} / {pull:g}"] = replace(recipe, distillation=distillation)
    return found


def main() -> None:
    """Runs the sweep, shows progress and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12544)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--divergence", type=float, nargs="+", default=DIVERGENCE_WEIGHTS)
    parser.add_argument("--alignment", type=float, nargs="+", default=ALIGNMENT_WEIGHTS)
    arguments = parser.parse_args()
    known = json.loads(STORE.read_text()) if STORE.exists() else {}
    done = known.setdefault(str(arguments.tokens), {})
    wanted = candidates(arguments.rates, arguments.divergence, arguments.alignment)
    missing = {name: strategy for name, strategy in wanted.items() if name not in done}
    if missing:
        for one in trials.run(missing, tokens=arguments.tokens, workers=arguments.workers):
            done[one.name] = asdict(one)
        STORE.write_text(json.dumps(known, indent=1))
    ranked = sorted(done.values(), key=lambda one: -one["accuracy"])
    lines = [
        [
            one["name"],
            f"{one['accuracy']:.4f} ± {one['stderr']:.4f}",
            f"{one['perplexity']:.2f}",
            f"{one['agreement']:.3f}",
        ]
        for one in ranked
    ]
    text = (
        f"{len(lines)} variants, {arguments.tokens:,} tokens each, one seed, judged on validation "
        f"as {ranked[0]['deployment']}.\n\n"
    )
    titles = ["rate / divergence weight / alignment weight", "accuracy", "perplexity", "agreement"]
    print(
        report.write("baseline-sweep", "Sweep of the hand-designed recipe", [text + report.table(titles, lines)], STORE)
    )


if __name__ == "__main__":
    main()
