"""What a search has shown: which dimensions mattered, what ended early, which limit binds and what would fit next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autodistill.budget import read_budget
from autodistill.contracts import Plan, Status
from autodistill.errors import InputError
from autodistill.estimate import fits, holdable, spec_from_config
from autodistill.records.choice import chosen, contenders
from autodistill.records.json_files import read_json
from autodistill.records.leaderboard import DISTILLED
from autodistill.records.openings import opened, openings_of
from autodistill.records.recalibration import corrected, least_beyond
from autodistill.records.row import REMOVED, Row, rows_of
from autodistill.records.saved import Saved, saved
from autodistill.records.store import RunFolder
from autodistill.search.study import Observation, importance
from autodistill.space import Space
from autodistill.strategy import Deployment
from autodistill.units import format_bytes

# With fewer results a share of the variance is noise.
_FEWEST_RESULTS = 8


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the log of a run tells.

    Attributes:
        metric: That the search was judged by.
        importance: Share of what sets good trials apart that each dimension accounts for, by path, the largest first;
            of values at the first rung, which every trial reports. Empty where there were too few.
        results: Trials with such a value.
        rejected: How many proposals were rejected, by reason.
        stopped: How many trials ended at each rung, by its tokens; those at full fidelity, and
            what was trained on, come last.
        failed: How many trials failed, by cause.
        retried: How many pieces of work failed once and were given out again, by cause.
        tokens_trained: Training tokens of all trials up to where each ended, those of shared stages counted once.
        tokens_full: What the same trials would have taken to the end, each of them.
        tokens_rejected: What the rejected ones would have taken to the first rung.
        saved: What sharing stages and rejecting saved, and what all training took.
        openings: How often each run here opened the test split of this data.
        binding: The limit and how near the best row is to it, in a sentence.
        next: What would fit next, in sentences.
    """

    metric: str
    importance: Mapping[str, float]
    results: int
    rejected: Mapping[str, int]
    stopped: Mapping[int, int]
    failed: Mapping[str, int]
    retried: Mapping[str, int]
    tokens_trained: int
    tokens_full: int
    tokens_rejected: int
    saved: Saved
    openings: Mapping[str, int]
    binding: str
    next: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return asdict(self) | {"next": list(self.next), "stopped": {str(key): n for key, n in self.stopped.items()}}

    def describe(self) -> str:
        """The explanation as lines for a person."""
        lines = []
        if self.importance:
            lines.append(f"What mattered, of {self.results} trials at the first rung by {self.metric} (PED-ANOVA):")
            lines += [f"  {share:6.1%}  {path}" for path, share in self.importance.items()]
        else:
            lines.append(f"{self.results} results are too few to tell which dimensions mattered.")
        lines.append("How far trials went:")
        lines += [f"  {count:4d}  ended at {tokens:,} tokens" for tokens, count in self.stopped.items()]
        lines += [f"  {count:4d}  rejected without training: {reason}" for reason, count in self.rejected.items()]
        lines += [f"  {count:4d}  failed: {cause}" for cause, count in self.failed.items()]
        lines += [f"  {count:4d}  failed once and tried again: {cause}" for cause, count in self.retried.items()]
        if self.tokens_full:
            reached = self.tokens_trained + self.saved.shared_tokens
            shared = f", {self.saved.shared_tokens:,} of them shared with others" if self.saved.shared_tokens else ""
            lines.append(
                f"Trials reached {reached:,} of the {self.tokens_full:,} tokens that all of them to the end would be "
                f"({1 - reached / self.tokens_full:.0%} saved by stopping){shared}."
            )
        lines += [f"{sentence}." for sentence in self.saved.describe()]
        return "\n".join([*lines, opened(self.openings), self.binding, *self.next])


def explain(run: RunFolder) -> Explanation:
    """Reads the log of a run, finished or under way.

    Raises:
        InputError: There is no trial yet.
    """
    asked, events = read_json(run.search_file), run.events.read()
    plan, space = Plan.from_json(asked["plan"]), Space.from_json(asked["space_definition"])
    trials = {event["trial"]: event for event in events if event["event"] == "trial"}
    if not trials:
        raise InputError(f"the run {run.name!r} has no trial yet: nothing to explain")
    rungs = [event for event in events if event["event"] == "rung"]
    ends = {event["trial"]: event for event in events if event["event"] == "status"}
    reached: dict[str, int] = {}
    for event in rungs:
        reached[event["trial"]] = max(reached.get(event["trial"], 0), event["tokens"])
    rejected = _reasons(ends, Status.REJECTED)
    first = {event["trial"]: event["value"] for event in rungs if event["rung"] == 0 and event["value"] is not None}
    points = {trial: event["point"] for trial, event in trials.items() if event["point"] is not None}
    results = [
        Observation(point=points[trial], state=Status.COMPLETED, value=value, fidelity=1.0)
        for trial, value in first.items()
        if trial in points
    ]
    spared = saved(events, plan)
    binding, following = _limits(asked, rows_of(events))
    return Explanation(
        metric=asked["metric"],
        importance=importance(space, results, asked["direction"]) if len(results) >= _FEWEST_RESULTS else {},
        results=len(results),
        rejected=rejected,
        stopped=dict(sorted(Counter(reached.values()).items())),
        failed=_reasons(ends, Status.FAILED),
        retried=dict(Counter(event["cause"] for event in events if event["event"] == "retry").most_common()),
        tokens_trained=sum(reached.values()) - spared.shared_tokens,
        tokens_full=sum(max(plan.tokens, tokens) for tokens in reached.values()),
        tokens_rejected=spared.rejected_tokens,
        saved=spared,
        openings=openings_of(run.path.parent, asked),
        binding=binding,
        next=following,
    )


def _reasons(ends: Mapping[str, Mapping[str, Any]], status: Status) -> dict[str, int]:
    reasons = Counter(str(event["reason"]) for event in ends.values() if event["status"] == status)
    return dict(reasons.most_common())


def _limits(asked: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, tuple[str, ...]]:
    """Which limit the best row is near to, and which better row is how far beyond it."""
    limit = asked["budget"]["memory_bytes"]
    judged = [row for row in rows if row.split == "validation" and row.full and row.memory_bytes]
    full = contenders(judged)
    beyond = least_beyond(full)
    students = [row for row in full if row.kind in DISTILLED]
    best = chosen(judged, asked["metric"], asked["direction"])
    if best is not None and corrected(best, beyond) > limit:
        # What was found of one student in its runtime, once exported, holds for those that were only predicted.
        fitting = [row for row in judged if row.kind not in DISTILLED or corrected(row, beyond) <= limit]
        best = chosen(fitting, asked["metric"], asked["direction"])
    if best is None:
        if not students:
            return "No student has been trained to the end yet.", ()
        least = min(students, key=lambda row: corrected(row, beyond))
        short = corrected(least, beyond) - limit
        if short <= 0:
            return f"Nothing fits: {least.name} as {least.deployment_name} is kept out ({least.reason}).", ()
        return f"Nothing fits {format_bytes(limit)}: the nearest needs {format_bytes(short)} more.", ()
    used = corrected(best, beyond) / limit
    binding = (
        f"The best, {best.name} as {best.deployment_name}, needs {format_bytes(corrected(best, beyond))} of "
        f"{format_bytes(limit)} ({used:.0%}): memory {'binds' if used > 0.9 else 'does not bind'}."
    )
    sign = 1 if asked["direction"] == "max" else -1
    best_value = best.figure(asked["metric"])
    out = [row for row in full if not (row.feasible or row.reason == REMOVED) or corrected(row, beyond) > limit]
    beaten = [
        row
        for row in out
        if (value := row.figure(asked["metric"])) is not None
        and best_value is not None
        and sign * value > sign * best_value
    ]
    nearest = sorted(beaten, key=lambda row: corrected(row, beyond))[:3]
    # One that was passed over for memory may fit by what another student has taken since.
    if any(corrected(row, beyond) <= limit and (row.reason or "").startswith("latency") for row in beaten):
        binding += " A limit of latency binds."
    better = [
        f"{_wanting(row, corrected(row, beyond) - limit)} {row.name} as {row.deployment_name}: {asked['metric']} "
        f"{row.figure(asked['metric']):.4f} instead of {best_value:.4f}{_packed_smaller(row, asked, beyond)}."
        for row in nearest
    ]
    return binding, (*better, *_packed_larger(best, full, asked, beyond))


def _fits(row: Row, asked: Mapping[str, Any], beyond: Mapping[str, int]) -> list[tuple[Deployment, int, bool]]:
    """Each deployment of the space for a row's student, what it needs in bytes, and whether it keeps to the budget."""
    if row.shape is None:
        return []
    spec, budget = spec_from_config(row.shape), read_budget(asked["budget"])
    deployments = Space.from_json(asked["space_definition"]).deployments
    found = []
    for fit in fits(spec, holdable(spec, deployments), budget):
        need = fit.need + beyond.get(fit.deployment.runtime, 0)
        found.append((fit.deployment, need, fit.slack <= 0 and need <= budget.memory_bytes))
    return found


def _packed_smaller(row: Row, asked: Mapping[str, Any], beyond: Mapping[str, int]) -> str:
    """The largest deployment of the space under which a row's student keeps to the budget, in words; else nothing."""
    found = [
        (need, deployment.name)
        for deployment, need, holds in _fits(row, asked, beyond)
        if holds and deployment.name != row.deployment_name
    ]
    if not found:
        return ""
    need, name = max(found)
    return f", or it fits as {name}, which needs {format_bytes(need)}"


def _packed_larger(
    best: Row, rows: Sequence[Row], asked: Mapping[str, Any], beyond: Mapping[str, int]
) -> tuple[str, ...]:
    """With how much more memory the best student would fit in a larger deployment, where none was evaluated for want
    of it.
    """
    limit = asked["budget"]["memory_bytes"]
    known = {row.deployment_name for row in rows if row.trial == best.trial}
    found = [
        (need, deployment.name)
        for deployment, need, _ in _fits(best, asked, beyond)
        if need > limit and deployment.name not in known
    ]
    if not found:
        return ()
    need, name = min(found)
    return (
        f"{format_bytes(need - limit)} more would hold the best as {name}, which was not evaluated for want of it.",
    )


def _wanting(row: Row, over: int) -> str:
    """What keeps a row out: so many bytes, or the limit that its reason names."""
    return f"{format_bytes(over)} more would hold" if over > 0 else f"({row.reason}) keeps out"
