"""A sweep that chooses the hand-designed recipe's learning rate and weights, at its number of tokens in the main job.

    python -m benchmarks.search.baseline_sweep [--tokens 12544] [--rates 1e-4 2e-4] [--divergence 0.5] [--alignment 1]

Each candidate is trained straight to the end on the default data and judged on validation, on the grid on which the
recipe finishes. Earlier results are kept next to the report and not trained again. The values of the best candidate are
those of `search_spaces/strategies/hand_designed.yaml`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

from autodistill.strategy.named import load_strategy
from autodistill.strategy.strategy import Strategy
from benchmarks.common import program, report, trials

RATES = (1e-4, 2e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
DIVERGENCE_WEIGHTS = (0.5, 0.9)
ALIGNMENT_WEIGHTS = (0.1, 1.0)


def candidates(rates: list[float], divergence: list[float], alignment: list[float]) -> dict[str, Strategy]:
    """Return the recipe with each combination of these values, by name."""
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
    """Train the recipe at each rate and weight that is not stored yet, and write the report."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--tokens", type=program.token_count, default=12544, help="training tokens of each")
    parser.add_argument("--workers", type=int, default=2, help="that train at once")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    parser.add_argument(
        "--divergence", type=float, nargs="+", default=DIVERGENCE_WEIGHTS, help="weights of the divergence"
    )
    parser.add_argument(
        "--alignment", type=float, nargs="+", default=ALIGNMENT_WEIGHTS, help="weights of the alignment"
    )
    arguments = program.parse(parser, tokens=256, workers=2, rates=[1e-4], divergence=[0.5], alignment=[1.0])
    store = program.REPORTS / "baseline-sweep.json"
    inputs = trials.small_inputs() if arguments.smoke else {}
    known = json.loads(store.read_text()) if store.exists() else {}
    done = known.setdefault(str(arguments.tokens), {})
    wanted = candidates(arguments.rates, arguments.divergence, arguments.alignment)
    missing = {name: strategy for name, strategy in wanted.items() if name not in done}
    if missing:
        for one in trials.run(missing, tokens=arguments.tokens, workers=arguments.workers, **inputs):
            done[one.name] = asdict(one)
        store.write_text(json.dumps(known, indent=1))
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
        report.write("baseline-sweep", "Sweep of the hand-designed recipe", [text + report.table(titles, lines)], store)
    )


if __name__ == "__main__":
    main()
