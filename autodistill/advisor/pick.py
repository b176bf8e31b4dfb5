"""Choose the best stored row for given hardware from what is on file. Nothing is trained or loaded."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import le
from typing import Any, cast

from autodistill.advisor.candidates import Candidate, with_documents
from autodistill.advisor.requirements import Conditions, Requirements, requirements_of
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.fit import in_blocks
from autodistill.estimates.serving_memory import basis_of
from autodistill.evaluation.base import Direction
from autodistill.hardware.budget import CONTEXT, check_streams
from autodistill.hardware.catalog import device_classes
from autodistill.hardware.device import DISCRETE, Device
from autodistill.runs.results.leaderboard import UNTRAINED, rank
from autodistill.units import count_of, format_bytes, format_duration, written_bytes

TIERS = tuple(size * 10**9 for size in (4, 8, 12, 16, 24, 48, 80))
"""Classes of GPUs by their nominal memory, in bytes."""

LIMITS = (512 * 10**6, 10**9, 2 * 10**9)
"""Smaller tiers, in bytes: limits of a process's memory, such as a container's, or what a board leaves free."""

_MOST_TIED = 32  # most rows among which a smaller one that is tied with the best is sought
_CONTEXT_STEP = 256  # a shorter context that is suggested is a multiple of this


class _ExcludedSizes:
    """Rows that exceeded a limit. A row on the same grids that is no smaller in any size exceeds it too.

    So most rows that do not fit are skipped without computing their requirements. This is only valid if the
    requirements follow from the shape, so measured rows are excluded.
    """

    def __init__(self) -> None:
        self._known: defaultdict[tuple[Any, ...], list[tuple[int, ...]]] = defaultdict(list)

    def implies(self, place: _Place) -> bool:
        """Return whether a row exceeds a limit at least as much as an earlier row did."""
        alike, sizes = place
        known = self._known.get(alike, [])
        for index, least in enumerate(known):
            if all(map(le, least, sizes)):
                # An entry that ruled out one row is likely to rule out the next, so check it first.
                known.insert(0, known.pop(index))
                return True
        return False

    def add(self, place: _Place, solved: Requirements) -> None:
        excess = solved.excess
        if max(excess, key=lambda name: excess[name]) != "accuracy":
            alike, sizes = place
            self._known[alike].append(sizes)


_Place = tuple[tuple[Any, ...], tuple[int, ...]]
"""What rows must have in common to be compared by size, and a row's sizes."""


def _place(candidate: Candidate) -> _Place | None:
    """Return a row's group and its sizes, or None if its requirements do not follow from its shape alone."""
    cells, shape = candidate.cells, candidate.shape
    size, need = cells.get("size_bytes"), cells.get("memory_bytes")
    if shape is None or size is None or need is None:
        return None
    if "measured" in (cells.get("memory_source"), cells.get("latency_source")):
        return None
    alike, sizes = shape.sizes
    packed = (cells["deployment"], in_blocks(shape.config, candidate.deployment))
    return (*packed, cells.get("context"), cells.get("batch"), *alike), (size, need, *sizes)


def pick(candidates: Iterable[Candidate], conditions: Conditions) -> dict[str, Any]:
    """Return the best row within all limits, the runner-up, the margins, and the limit that excludes better rows.

    The smallest of the rows that are tied with the best, as `leaderboard.rank` defines ties, is picked. Rows of
    runtimes that the device does not have are left out. Students whose search did not check forgetting are ranked after
    all other rows ("last" names their runs), because the best on the text alone may be the one that forgot most. If no
    checked student fits, one of them may be picked ("not_held").

    "binds" is the limit that the best excluded row exceeds by most, or None if no better row was excluded.

    Raises:
        NothingFitsError: No row fits. The message has the nearest row, and the smallest change that would make it fit.
        InputError: There are no rows, or more streams are asked for than any machine can decode.
    """
    check_streams(conditions.streams, "--streams")
    rows = list(candidates)
    answer = _pick(rows, conditions)
    others = {(one.run, one.cells["row_id"]) for one in rows if not one.forgetting_limited}
    if others and answer["pick"]["kind"] in UNTRAINED:
        answer = _pick([replace(one, forgetting_limited=True) for one in rows], conditions)
    return answer | {"not_held": (answer["pick"]["run"], answer["pick"]["row_id"]) in others}


def _pick(candidates: Iterable[Candidate], conditions: Conditions) -> dict[str, Any]:
    """Pick as `pick` does, with students whose forgetting was not limited after all other rows."""
    ranked = sorted(candidates, key=_order)
    if not ranked:
        raise InputError("there is no student that was trained to the end: run autodistill search first")
    usable = [one for one in ranked if not _lacks(one, conditions)]
    # If a runtime was asked for, rows of other runtimes are not reported.
    others = Counter(one.deployment.runtime for one in ranked if conditions.runtime is None and _lacks(one, conditions))
    if not usable:
        another = "--device" if conditions.runtime is None else "--runtime, or --device"
        raise NothingFitsError(f"nothing fits: {_lacks(ranked[0], conditions)}; name another {another}")
    left_out: list[Requirements] = []
    chosen: list[Requirements] = []
    unknown = better_unknown = 0
    broken = _ExcludedSizes()
    for one in usable:
        if len(chosen) >= 2 and (len(chosen) == _MOST_TIED or not _may_tie(chosen[0].candidate, one)):
            break
        place = _place(one)
        if place and broken.implies(place):
            continue
        solved = requirements_of(one, conditions)
        if solved is None:
            unknown += 1
            better_unknown += not chosen
        elif solved.fits:
            chosen.append(solved)
        else:
            if place:
                broken.add(place, solved)
            if not chosen:
                left_out.append(solved)
    if not chosen:
        raise NothingFitsError(_nothing(usable, left_out, unknown, conditions))
    chosen, tied = _smallest_first(chosen)
    excess = left_out[0].excess if left_out else {}
    return {
        "pick": chosen[0].to_json(),
        "runner_up": chosen[1].to_json() if len(chosen) > 1 else None,
        "binds": max(excess, key=lambda name: excess[name]) if excess else None,
        "better_left_out": left_out[0].to_json() if left_out else None,
        "unknown": unknown,
        "better_unknown": better_unknown,
        "tied": tied,
        "other_runtimes": dict(others),
        "last": _last(usable, chosen[0].candidate),
        "context": chosen[0].context,
        "streams": conditions.streams,
        "device": conditions.device.name if conditions.device else None,
        "memory_basis": _basis(chosen[0], conditions),
        "memory_overhead": asdict(conditions.overhead(chosen[0].candidate.row.deployment.runtime)),
    }


def _basis(solved: Requirements, conditions: Conditions) -> str | None:
    """Return what the figure of GPU memory rests on, or None if it was measured or is no GPU memory."""
    if not conditions.on_gpu or solved.sources["memory"] == "measured":
        return None
    return basis_of(solved.candidate.deployment.runtime, on_gpu=True)


def _last(usable: Sequence[Candidate], picked: Candidate) -> list[str]:
    """Return the runs with students that rank after the picked one although their metric is better."""
    behind = (
        one for one in usable if picked.forgetting_limited and not one.forgetting_limited and one.worth > picked.worth
    )
    return sorted({one.run for one in behind})


def _lacks(candidate: Candidate, conditions: Conditions) -> str:
    """Return why a row cannot be served by the requested runtime or on the device, or ""."""
    own = candidate.deployment.runtime
    if conditions.runtime not in (None, own):
        return f"{candidate.row.row_id} is served by {own}, not by {conditions.runtime}"
    return conditions.device.lacks(candidate.deployment.runtime) if conditions.device else ""


def _may_tie(best: Candidate, other: Candidate) -> bool:
    """Return whether two rows may be tied: whether their difference is within the sum of both errors.

    The standard error of a paired difference is at most that sum.
    """
    errors = [one.row.figure(f"{best.metric}_stderr") for one in (best, other)]
    return (
        best.forgetting_limited == other.forgetting_limited
        and None not in errors
        and best.worth - other.worth <= sum(filter(None, errors))
    )


def _smallest_first(chosen: list[Requirements]) -> tuple[list[Requirements], int]:
    """Return the rows with the leaderboard's choice first, and the number of rows tied with it."""
    one = chosen[0].candidate
    near = [solved for solved in chosen if _may_tie(one, solved.candidate)]
    if len(near) < 2:
        return chosen, 1
    # Use places as ids, since rows of several runs may share one. `feasible` is about a run's own budget; here all fit.
    rows = [
        replace(row, row_id=str(place), feasible=True)
        for place, row in enumerate(with_documents([solved.candidate for solved in near]))
    ]
    order = rank(rows, one.metric, cast(Direction, one.direction))
    first = near[int(order[0].row.row_id)]
    return [first, *(solved for solved in chosen if solved is not first)], max(1, sum(item.tied for item in order))


def _order(candidate: Candidate) -> tuple[bool, float, float, str, str]:
    cells = candidate.cells
    return (
        not candidate.forgetting_limited,
        -candidate.worth,
        cells.get("memory_bytes") or math.inf,
        candidate.run,
        cells["row_id"],
    )


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A class of GPUs with the same amount of memory, or a limit of a process's memory.

    Attributes:
        nominal_bytes: That memory.
        usable_bytes: Memory that every known GPU of the class leaves for a student. For a process's limit, all of it.
        device: The GPU that leaves least, or None if no GPU of the class is known.
        gpu: Whether it is a class of GPUs.
    """

    nominal_bytes: int
    usable_bytes: int
    device: str | None
    gpu: bool = True


def all_tiers(known: Iterable[Device]) -> list[Tier]:
    """Return the limits of a process's memory, followed by the classes of GPUs."""
    devices = list(known)
    limits = (Tier(nominal_bytes=size, usable_bytes=size, device=None, gpu=False) for size in LIMITS)
    return [*limits, *(tier_of(size, devices) for size in TIERS)]


def tier_of(nominal_bytes: int, known: Iterable[Device]) -> Tier:
    """Return the memory that every GPU of a class leaves usable.

    A manufacturer's GB, and the GB that a driver reports, is between 10^9 and 2^30 bytes. If no GPU of the class is
    known, a GB is 10^9 bytes, less what discrete GPUs reserve.
    """
    most = nominal_bytes * 2**30 // 10**9
    alike = [one for one in known if one.discrete and nominal_bytes <= one.memory_bytes <= most]
    if alike:
        least = min(alike, key=lambda one: one.usable_bytes)
        return Tier(nominal_bytes=nominal_bytes, usable_bytes=least.usable_bytes, device=least.name)
    kind = device_classes()[DISCRETE]
    left = int(nominal_bytes * kind.share_of(nominal_bytes)) - kind.reserve_bytes
    return Tier(nominal_bytes=nominal_bytes, usable_bytes=left, device=None)


def pick_tiers(candidates: Sequence[Candidate], conditions: Conditions, tiers: Sequence[Tier]) -> dict[str, Any]:
    """Return the best row for each tier, or None if nothing fits it.

    For each tier, "binds" is the limit that excludes a better row, and "same_as" the memory in bytes of the first tier
    that has the same row.
    """
    rows: list[dict[str, Any]] = []
    last: set[str] = set()
    for tier in tiers:
        limited = replace(conditions, memory_bytes=tier.usable_bytes, device=None, gpu=tier.gpu)
        try:
            found = pick(candidates, limited)
        except NothingFitsError as error:
            found = {
                "nothing": str(error).removeprefix("nothing fits: "),
                "pick": None,
                "binds": None,
                "last": [],
                "not_held": False,
            }
        last.update(found["last"])
        answer = found["pick"]
        same = (one["memory_bytes"] for one in rows if answer and one["pick"] and _is_same(one["pick"], answer))
        rows.append(
            {
                "memory_bytes": tier.nominal_bytes,
                "usable_bytes": tier.usable_bytes,
                "least_device": tier.device,
                "gpu": tier.gpu,
                "pick": answer,
                "binds": found["binds"],
                "not_held": found["not_held"],
                "nothing": found.get("nothing"),
                "same_as": next(same, None),
            }
        )
    runtimes = sorted({one["pick"]["runtime"] for one in rows if one["pick"] and one["gpu"]})
    return {
        "tiers": rows,
        "context": conditions.context,
        "streams": conditions.streams,
        "memory_basis": {runtime: basis_of(runtime, on_gpu=True) for runtime in runtimes},
        "last": sorted(last),
    }


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["run"], one["row_id"]) == (other["run"], other["row_id"])


def _nothing(
    ranked: Sequence[Candidate], left_out: Sequence[Requirements], unknown: int, conditions: Conditions
) -> str:
    """Return why nothing fits: the nearest row, the limit that it exceeds most, and what would make it fit."""
    if not left_out:
        reads = [one.shape.config["max_position_embeddings"] if one.shape else math.inf for one in ranked]
        if conditions.context is not None and conditions.context > max(reads):
            return (
                f"no student reads a context of {conditions.context} tokens: the longest reads {max(reads)}; "
                f"give --context {max(reads)} or less"
            )
        at = f"context {conditions.context or CONTEXT} and {count_of(conditions.streams, 'stream')}"
        return (
            f"none of {unknown} rows can be solved at {at}: their teacher is no longer in its place, or their context "
            "is shorter; ask for the context that they were stored at"
        )
    nearest = min(left_out, key=lambda one: max(one.excess.values()))
    name = max(nearest.excess, key=lambda limit: nearest.excess[limit])
    need, limit = nearest.needs[name], nearest.limits[name]
    if name == "accuracy":
        score = nearest.candidate.score
        known = f"a value of {score} of {need:.4f}" if score != "accuracy" else f"an accuracy of {need:.4f}"
        misses = f"has no {score}" if nearest.sources[name] == "missing" else f"has {known}, below {limit:g}"
    elif name == "memory":
        misses = f"needs {format_bytes(need)} at context {nearest.context}, {format_bytes(need - limit)} over the limit"
    else:
        how = "measured" if nearest.sources[name].startswith("measured") else "predicted"
        times = need / limit
        misses = f"is {how} {format_duration(need)}, {times:,.{0 if times >= 100 else 2}f} times {name}"
    row = nearest.candidate.row
    changes = " or ".join(_changes(nearest, conditions))
    return f"nothing fits: the nearest, {row.row_id} of {nearest.candidate.run}, {misses}; {changes}"


def _changes(nearest: Requirements, conditions: Conditions) -> Iterator[str]:
    """Yield what would make a row fit, the smallest change first: fewer streams, a shorter context, other limits."""
    candidate = nearest.candidate
    broken = [name for name, excess in nearest.excess.items() if excess > 0]
    if "accuracy" not in broken:
        fewer = _largest_fitting(candidate, conditions.with_streams, conditions.streams - 1)
        if fewer:
            # Do not name an option: the streams may come from --streams or from a limit of latency.
            yield f"{count_of(fewer, 'stream')} would be enough"
        cells = _largest_fitting(
            candidate,
            lambda count: replace(conditions, context=_CONTEXT_STEP * count),
            (nearest.context - 1) // _CONTEXT_STEP,
        )
        if cells:
            yield f"--context {_CONTEXT_STEP * cells} would be enough"
    limits = {limit.describe(): limit for limit in conditions.latency}
    asked = []
    for name in broken:
        need = nearest.needs[name]
        if name == "memory":
            asked.append(f"a budget of {written_bytes(math.ceil(need))}")
        elif name == "accuracy" and nearest.sources[name] == "missing":
            asked.append("no --min-accuracy")
        elif name == "accuracy":
            asked.append(f"--min-accuracy {math.floor(1e4 * need) / 1e4:.4f}")
        else:
            asked.append(replace(limits[name], seconds=need).typed())
    yield f"{' and '.join(asked)} would be enough"


def _largest_fitting(candidate: Candidate, asked: Callable[[int], Conditions], limit: int) -> int:
    """Return the largest count up to a limit with which a row fits, or 0. Requirements only grow with the count."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        solved = requirements_of(candidate, asked(middle))
        if solved is not None and solved.fits:
            low = middle
        else:
            high = middle - 1
    return low
