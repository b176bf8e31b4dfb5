"""The verdict on each target from the rows: met, failed with its number, or not run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from autodistill.evaluation.statistics import paired_bootstrap
from autodistill.units import parse_bytes
from benchmarks.common.over_seeds import error, is_clear
from benchmarks.search.versus.blocks import Block

Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Mapping[Block, Mapping[str, Row]]
"""Rows by block and arm. An arm for which nothing fitted has a row without figures."""

MET, FAILED, NOT_RUN = "met", "failed", "not run"
MINE, QUICK, UNTRAINED = "search", "search-short", "untrained"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on a target.

    Attributes:
        state: Met, failed or not run.
        said: The reason, with its numbers.
    """

    state: str
    said: str


def has_figures(row: Row | None) -> bool:
    """Return whether an arm exported something that was scored."""
    return row is not None and "test" in row


def gap(mine: Row, other: Row, what: str, text: str = "test") -> tuple[float, float]:
    """Return how much higher a sum over tokens is, per token, and its standard error, paired by document."""
    first, second = mine[text]["documents"], other[text]["documents"]
    gaps = np.asarray(first[what], float) - np.asarray(second[what], float)
    values, errors = paired_bootstrap(gaps[None], np.asarray(first["count"], float))
    return float(values[0]), float(errors[0])


def best_rival(rows: Mapping[str, Row], rivals: Sequence[str]) -> str | None:
    """Return the arm with the lowest NLL on test, among those whose export fits."""
    known = {arm: rows[arm]["test"]["nll"][0] for arm in rivals if has_figures(rows.get(arm)) and rows[arm]["fits"]}
    return min(known, key=lambda arm: known[arm], default=None)


def verdicts(targets: Sequence[Mapping[str, Any]], rows: Rows, rivals: Sequence[str]) -> dict[str, Verdict]:
    """Return whether each target is met, by its name."""
    core = _complete_blocks(rows, rivals)
    found = {}
    for target in targets:
        if "measure" not in target:
            found[target["id"]] = Verdict(state=NOT_RUN, said=target["where"])
            continue
        of = rows if target["measure"] in _OF_ANY_BLOCK else core
        found[target["id"]] = _MEASURES[target["measure"]](target, of, rivals)
    return found


def _complete_blocks(rows: Rows, rivals: Sequence[str]) -> dict[Block, Mapping[str, Row]]:
    """Return the blocks for which the search and every rival were run."""
    return {
        block: found
        for block, found in rows.items()
        if all(arm in found for arm in (*rivals, MINE)) and has_figures(found[MINE]) and best_rival(found, rivals)
    }


def _ahead(target: Mapping[str, Any], rows: Rows, rivals: Sequence[str]) -> Verdict:
    """Judge the lead by whole blocks. One rival that is ahead fails the target, even if others were not run."""
    if behind := _behind(rows, rivals):
        return Verdict(state=FAILED, said=f"behind a rival in {behind}")
    cells = defaultdict(list)
    for block, found in _complete_blocks(rows, rivals).items():
        rival = best_rival(found, rivals)
        assert rival is not None
        cells[block.cell].append(-gap(found[MINE], found[rival], "nll")[0])
    means = {cell: float(np.mean(gains)) for cell, gains in cells.items()}
    said = ", ".join(f"{cell} {mean:+.4f}" for cell, mean in means.items())
    return _verdict(means, all(mean > 0 for mean in means.values()), f"nats ahead of the best rival: {said}")


def _behind(rows: Rows, rivals: Sequence[str]) -> str:
    """Describe the blocks in which a rival is ahead, whether they are whole or not."""
    found = []
    for block, known in rows.items():
        rival = best_rival(known, rivals)
        if rival is not None and has_figures(known.get(MINE)):
            value, one = gap(known[MINE], known[rival], "nll")
            if value > 0:
                found.append(f"{block.name} by {value:.4f} ± {one:.4f} nats ({rival})")
    return ", ".join(found)


def _gain(target: Mapping[str, Any], rows: Rows, rivals: Sequence[str]) -> Verdict:
    gains = []
    for found in rows.values():
        rival = best_rival(found, rivals)
        assert rival is not None
        gains.append(100 * gap(found[MINE], found[rival], "correct")[0])
    if not gains:
        return _verdict(gains, False, "")
    mean, clear = float(np.mean(gains)), is_clear(gains)
    spread = f" ± {error(gains):.2f}" if len(gains) > 1 else ", one block"
    said = f"{mean:+.2f}{spread} points over {len(gains)} blocks"
    return _verdict(gains, mean >= target["least"] and clear, said)


def _short(target: Mapping[str, Any], rows: Rows, rivals: Sequence[str]) -> Verdict:
    gains = []
    for found in rows.values():
        rival = best_rival(found, rivals)
        assert rival is not None
        if has_figures(found.get(QUICK)):
            gains.append(-gap(found[QUICK], found[rival], "nll")[0])
    said = f"with 40% less time {np.mean(gains) if gains else 0:+.4f} nats ahead of the best rival's end"
    return _verdict(gains, bool(gains) and float(np.mean(gains)) >= 0, said)


def _guard(target: Mapping[str, Any], rows: Rows, rivals: Sequence[str]) -> Verdict:
    worse = []
    for found in rows.values():
        if has_figures(found[UNTRAINED]):
            worse.append(gap(found[MINE], found[UNTRAINED], "kl", "general"))
    said = ", ".join(f"{value:+.4f} ± {one:.4f}" for value, one in worse)
    held = all(value <= one for value, one in worse)
    return _verdict(worse, held, f"nats of general-text KL above the untrained row, by block: {said}")


def _kl(target: Mapping[str, Any], rows: Rows, rivals: Sequence[str]) -> Verdict:
    ratios = []
    for found in rows.values():
        known = [found[arm] for arm in rivals if has_figures(found[arm]) and found[arm]["fits"]]
        if found[MINE]["bits"] <= target["bits"]:
            least = min(one["general"]["kl"][0] for one in known)
            ratios.append(found[MINE]["general"]["kl"][0] / max(least, 1e-9))
    said = f"{np.mean(ratios) if ratios else 0:.2f} of the least of the rivals, over {len(ratios)} blocks"
    return _verdict(ratios, bool(ratios) and float(np.mean(ratios)) <= target["most"], said)


def _packaged(target: Mapping[str, Any], rows: Rows, rivals: Sequence[str]) -> Verdict:
    """Judge gains over the untrained row in all packaged blocks that have both. Only the target's budgets decide."""
    asked = {parse_bytes(size) for size in target["budgets"]}
    gains: dict[Block, tuple[float, float]] = {}
    for block, found in rows.items():
        if block.budget > 1 and has_figures(found.get(MINE)) and has_figures(found.get(UNTRAINED)):
            gains[block] = gap(found[MINE], found[UNTRAINED], "correct")
    said = ", ".join(f"{block.name} {100 * value:+.2f} ± {100 * one:.2f}" for block, (value, one) in gains.items())
    deciding = {block: value for block, (value, _) in gains.items() if block.budget in asked}
    if asked - {block.budget for block in deciding}:
        return Verdict(state=NOT_RUN, said=f"not all budgets have their rows; so far: {said or 'none'}")
    return _verdict(deciding, all(100 * value >= target["least"] for value in deciding.values()), f"{said} points")


def _beside(target: Mapping[str, Any], rows: Rows, rivals: Sequence[str]) -> Verdict:
    """Judge the search beside arms that share its library: it may be behind each by one standard error."""
    behind, said = [], []
    for block, found in rows.items():
        for arm in target["arms"]:
            if has_figures(found.get(MINE)) and has_figures(found.get(arm)):
                value, one = gap(found[MINE], found[arm], "nll")
                behind.append(value - one)
                said.append(f"{block.name} {arm} {value:+.4f} ± {one:.4f}")
    return _verdict(behind, all(one <= 0 for one in behind), f"nats behind the arm: {', '.join(said)}")


def _between(target: Mapping[str, Any], rows: Rows, rivals: Sequence[str]) -> Verdict:
    """Judge how much of the gap between the first and the last of three arms the one between them closes."""
    worse, between, better = target["arms"]
    shares = []
    said = []
    for block, found in rows.items():
        if all(has_figures(found.get(arm)) for arm in target["arms"]):
            closed, whole = gap(found[worse], found[between], "nll"), gap(found[worse], found[better], "nll")
            shares.append(closed[0] / whole[0] if whole[0] > 0 else 1.0)
            bits = "/".join(f"{found[arm]['bits']:.2f}" for arm in target["arms"])
            said.append(
                f"{block.name} {closed[0]:+.4f} ± {closed[1]:.4f} of {whole[0]:+.4f} ± {whole[1]:.4f} nats "
                f"({bits} bits a weight)"
            )
    held = bool(shares) and min(shares) >= target["least"]
    return _verdict(shares, held, ", ".join(said))


def _verdict(known: Any, held: bool, said: str) -> Verdict:
    if not len(known):
        return Verdict(state=NOT_RUN, said="no block has all the rows that it takes")
    return Verdict(state=MET if held else FAILED, said=said)


_Measure: TypeAlias = Callable[[Mapping[str, Any], Rows, Sequence[str]], Verdict]
_OF_ANY_BLOCK = ("ahead", "packaged", "beside", "between")  # the other measures read whole blocks
_MEASURES: Mapping[str, _Measure] = {
    "ahead": _ahead,
    "gain": _gain,
    "short": _short,
    "guard": _guard,
    "kl": _kl,
    "packaged": _packaged,
    "beside": _beside,
    "between": _between,
}
