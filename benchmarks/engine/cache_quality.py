"""What students lose with a small teacher cache: drawn tokens and top-k against all logits, at equal tokens.

    python -m benchmarks.engine.cache_quality [--tokens 6144] [--seeds 5] [--workers 2] [--report]

The student is the default space's start: all layers with 70% of the FFN neurons. The loss is only the forward KL at
temperature 1, so anything that the cache leaves out is missing from all that the student learns. "states" is exact: the
teacher's last states times its head. Trials of one seed see the same sequences in the same order. Each finished trial
is a line of `reports/cache-quality.jsonl`. Existing lines are not trained again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Init, Strategy
from benchmarks.common import over_seeds, report, trials

STORE = "cache-quality.jsonl"
BASE = "all logits"
SIGNALS = {
    BASE: {"signal": "states", "signal_tokens": 0},
    "50 draws": {"signal": "sampled", "signal_tokens": 50},
    "60 draws": {"signal": "sampled", "signal_tokens": 60},
    "top-64": {"signal": "top-k", "signal_tokens": 64},
    "12 draws": {"signal": "sampled", "signal_tokens": 12},
}
# The target: at most this many bytes a token, with a quality within this share of that with all logits.
BYTES, SHARE = 100, 0.005


def shares(found: Mapping[str, Mapping[int, float]], name: str) -> list[float]:
    """Return by how much a case's figure differs from the base's, by seed."""
    base = found[BASE]
    return [found[name][seed] / base[seed] - 1 for seed in sorted(found[name].keys() & base.keys())]


def lines(found: list[trials.Result]) -> Iterator[list[str]]:
    """Yield the rows of the table, one for each kind of cache."""
    accuracy, perplexity = (trials.by_seed(found, figure) for figure in ("accuracy", "perplexity"))
    for name in SIGNALS:
        own = [one for one in found if one.name == name]
        if not own:
            continue
        row = [name, f"{np.mean([one.signal_bytes for one in own]):.0f}", str(len(own))]
        for figures, digits in ((accuracy, 4), (perplexity, 3)):
            row.append(over_seeds.mean(list(figures[name].values()), digits))
            row.append("" if name == BASE else over_seeds.mean(shares(figures, name), 2, factor=100, sign=True))
        yield row


def findings(found: list[trials.Result]) -> Iterator[str]:
    """Yield what each kind of cache loses, in sentences."""
    measures = {figure: trials.by_seed(found, figure) for figure in ("accuracy", "perplexity")}
    for name in SIGNALS:
        if name == BASE or name not in measures["accuracy"]:
            continue
        size = np.mean([one.signal_bytes for one in found if one.name == name])
        said = []
        for figure, figures in measures.items():
            off = shares(figures, name)
            losses = off if figure == "perplexity" else [-one for one in off]
            lost = float(np.mean(losses))
            verdict = (
                "lost" if lost > SHARE else "kept" if over_seeds.below(losses, SHARE) else "kept on the mean alone"
            )
            said.append(f"{figure} {over_seeds.mean(off, 2, factor=100, sign=True)}% ({verdict})")
        kept = f"Kept: no worse than by {SHARE:.1%}, chance allowed for."
        yield f"- {name}, {size:.0f} bytes a token: {'; '.join(said)}. {kept}"


def main() -> None:
    """Train a student on each form of the cache and seed, and write the report of what they lost."""
    arguments = trials.parse(trials.parser_of(__doc__))
    strategies = {
        name: Strategy(
            init=Init(depth=1.0, ffn=0.7),
            distillation=Distillation(divergence_weight=1.0, learning_rate=2e-4, **signal),
        )
        for name, signal in SIGNALS.items()
    }
    store, found = trials.study(arguments, STORE, strategies)
    titles = ["signal", "bytes/token", "seeds", "accuracy", "off, %", "perplexity", "off, %"]
    print(
        report.write(
            "cache-quality",
            "What a small teacher cache costs in quality",
            [
                f"SmolLM2-135M, students of all layers with 70% of the FFN, {arguments.tokens:,} training tokens each, "
                f'forward KL alone, T 1, rate 2e-4. {trials.judged(found)} "off" is relative to all logits, paired by '
                f"seed. The target: {SHARE:.1%} at {BYTES} bytes a token or fewer.",
                report.table(titles, lines(found)),
                "\n".join(findings(found)),
            ],
            store,
        )
    )


if __name__ == "__main__":
    main()
