"""Explanation of a search: which dimensions mattered, what ended early, which limit binds and what would fit next."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.estimates.fit import fits, holdable
from autodistill.hardware.budget import NO_LIMIT, read_budget
from autodistill.models.config import spec_from_config
from autodistill.runs.events import RungReached, TrialAdded, TrialEnded, WorkRetried, of_kind
from autodistill.runs.results.differences import paired, paired_difference
from autodistill.runs.results.gains import Gains, named
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED
from autodistill.runs.results.memory_correction import corrected, least_beyond
from autodistill.runs.results.objectives import Objective, objectives_of
from autodistill.runs.results.row import LIKELIHOOD, WITHIN_LIMITS, Row, Status
from autodistill.runs.results.selection import chosen, contenders, students_only
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.savings import Saved, saved
from autodistill.runs.test_split_ledger import opened, openings_of
from autodistill.search.algorithms.optuna_study import Importance, Observation, importance
from autodistill.search.construction.construction import Construction
from autodistill.search.prior.tried_rates import RangeTest
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.units import format_bytes, with_error

# With fewer results, the shares of variance would be noise.
FEWEST_RESULTS = 8


# The reason in words why a strategy was rejected, by the limit that it misses.
_CAUSES = {
    "memory": "the student takes too much memory",
    "latency": "the student is too slow",
    "training memory": "training takes too much memory",
}
_FIGURE = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Trials that ended for the same cause.

    Attributes:
        cause: The cause in words. If none was recorded, the reported reason with its figures removed.
        count: Number of these trials.
        said: The reason reported for one trial: the one that missed a limit by the least, or else the first.
        nearest: Whether `said` is about the trial that missed a limit by the least.
        alike: Whether the same reason was reported for all of them.
    """

    cause: str
    count: int
    said: str
    nearest: bool
    alike: bool

    def describe(self) -> str:
        """Return the reported reason. If reasons differ, name the cause and say which trial the reason is about."""
        return (
            self.said if self.alike else f"{self.cause}; {'the nearest' if self.nearest else 'the first'}: {self.said}"
        )


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Explains a run from its log.

    Attributes:
        metric: The metric that the search was judged by.
        constructions: Lines about what the solver found within the budget before anything was trained.
        rates: A sentence about the test of learning rates. Empty if none was run.
        race: Lines that compare the trials trained on exactly the planned tokens with the best of them.
        importance: By objective, which dimensions set the better trials apart. It uses values at the first rung, which
            every trial reports.
        rejected: Rejected proposals by cause, the most frequent cause first.
        stopped: Number of trials that ended at each rung, by the rung's tokens, in ascending order. So trials at full
            fidelity and extended trainings come last.
        failed: Failed trials by cause, the most frequent cause first.
        retried: By cause, how many pieces of work failed once and were handed out again.
        tokens_trained: Training tokens of all trials up to where each ended. Shared stages count once.
        tokens_full: Tokens that the same trials would have taken if all had been trained to the end.
        tokens_rejected: Tokens that the rejected trials would have taken up to the first rung.
        saved: What was saved by shared stages and rejections, and what all training took.
        openings: How often each run in this folder opened the test split of this data.
        gains: What was exported, and its gain on the test split over the best untrained row and the baseline. Empty
            before the search has ended.
        binding: A sentence about the limit and how close the best row is to it.
        next: Sentences about what would fit with more memory.
    """

    metric: str
    constructions: tuple[str, ...]
    rates: str
    race: tuple[str, ...]
    importance: Mapping[str, Importance]
    rejected: tuple[Ended, ...]
    stopped: Mapping[int, int]
    failed: tuple[Ended, ...]
    retried: Mapping[str, int]
    tokens_trained: int
    tokens_full: int
    tokens_rejected: int
    saved: Saved
    openings: Mapping[str, int]
    gains: str
    binding: str
    next: tuple[str, ...]

    @property
    def race_title(self) -> str:
        """The title of `race`. A single student was trained without a race."""
        return "What was trained, without a race" if len(self.race) == 1 else "What the race decided"

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return asdict(self) | {"next": list(self.next), "stopped": {str(key): n for key, n in self.stopped.items()}}

    def describe(self) -> str:
        """The explanation as lines for a person."""
        lines = ["What fits, before anything is trained:"] if self.constructions else []
        lines += [f"  {one}" for one in self.constructions]
        lines += [f"{self.rates[:1].upper()}{self.rates[1:]}."] if self.rates else []
        lines += [f"{self.race_title}:"] if self.race else []
        lines += [f"  {one}" for one in self.race]
        for objective, found in self.importance.items():
            lines += _table(objective, found)
        lines.append("Where trials ended:")
        lines += [f"  {count:4d}  ended at {tokens:,} tokens" for tokens, count in self.stopped.items()]
        lines += [f"  {ended.count:4d}  rejected without training: {ended.describe()}" for ended in self.rejected]
        lines += [f"  {ended.count:4d}  failed: {ended.describe()}" for ended in self.failed]
        lines += [f"  {count:4d}  failed once and tried again: {cause}" for cause, count in self.retried.items()]
        if self.tokens_full:
            reached = self.tokens_trained + self.saved.shared_tokens
            shared = f", {self.saved.shared_tokens:,} of them shared with others" if self.saved.shared_tokens else ""
            lines.append(
                f"Trials reached {reached:,} of the {self.tokens_full:,} tokens that all of them would take to the end "
                f"({1 - reached / self.tokens_full:.0%} fewer){shared}."
            )
        lines += [f"{sentence}." for sentence in self.saved.describe()]
        return "\n".join([*lines, opened(self.openings), *filter(None, [self.gains]), self.binding, *self.next])


def explain(run: RunFolder) -> Explanation:
    """Explain a run from its log. The run may be finished or in progress.

    Raises:
        InputError: The run has no trial yet.
    """
    asked, events = run.read_settings("metric", "direction", "budget", "plan", "space_definition"), run.events.all()
    plan, space = Plan.from_json(asked["plan"]), Space.stored(asked["space_definition"])
    run.check_together(len(plan.rungs))
    trials = {event.trial: event for event in of_kind(events, TrialAdded)}
    if not trials:
        raise InputError(f"the run {run.name!r} has no trial yet: nothing to explain")
    rungs = of_kind(events, RungReached)
    ends = {event.trial: event for event in of_kind(events, TrialEnded)}
    reached: dict[str, int] = {}
    for event in rungs:
        reached[event.trial] = max(reached.get(event.trial, 0), event.tokens)
    points = {trial: event.point for trial, event in trials.items() if event.point is not None}
    first = {event.trial: event for event in rungs if event.rung == 0 and event.trial in points}
    spared = saved(events, plan)
    try:
        binding, following = _limits(asked, run.events.rows())
    except InputError as error:
        raise InputError(f"{run.events.path} has a row whose shape cannot be read ({error}): restore it") from None
    race: tuple[str, ...] = ()
    if asked.get("constructions"):
        race = _race(run.events.rows(split="validation"), plan)
        # With several objectives, trials are not judged by likelihood.
        race += _lost(rungs, trials, plan) if len(_objectives(asked)) == 1 else ()
    return Explanation(
        metric=asked["metric"],
        constructions=tuple(Construction.from_json(one).describe() for one in asked.get("constructions", ())),
        rates=RangeTest.from_json(asked["rates"]).describe() if "rates" in asked else "",
        race=race,
        importance={
            objective.name: importance(
                space, _results(points, first.values(), place), objective.direction, fewest_results=FEWEST_RESULTS
            )
            for place, objective in enumerate(_objectives(asked))
            if space.dimensions
        },
        rejected=_ended(ends.values(), Status.REJECTED),
        stopped=dict(sorted(Counter(reached.values()).items())),
        failed=_ended(ends.values(), Status.FAILED),
        retried=dict(Counter(event.cause for event in of_kind(events, WorkRetried)).most_common()),
        tokens_trained=sum(reached.values()) - spared.shared_tokens,
        tokens_full=sum(max(plan.tokens, tokens) for tokens in reached.values()),
        tokens_rejected=spared.rejected_tokens,
        saved=spared,
        openings=openings_of(run.path.parent, asked),
        gains=gains.describe() if (gains := Gains.from_json(asked)) else "",
        binding=binding,
        next=following,
    )


def _race(rows: Sequence[Row], plan: Plan) -> tuple[str, ...]:
    """Return lines about the students trained on exactly the planned tokens, the best first.

    Each line has the loss and the paired difference to the best student. If there is only one student, its line has its
    last loss, after any extended training.
    """
    raced = [row for row in rows if row.kind == "student" and row.train_tokens == plan.tokens and row.perplexity]
    raced = [row for row in raced if row.interpolation is None]
    best_of_trial: dict[str, Row] = {}
    for row in sorted(raced, key=lambda row: row.perplexity or math.inf):
        best_of_trial.setdefault(row.trial, row)
    firsts = list(best_of_trial.values())
    if len(firsts) == 1:
        students = (
            row for row in rows if row.kind == "student" and row.perplexity and row.strategy == firsts[0].strategy
        )
        last = max(students, key=lambda row: row.train_tokens or 0)
        loss = math.log(last.perplexity or math.inf)
        return (f"{named(last)}: {loss:.4f} nats a token after {last.train_tokens or 0:,} tokens",)
    lines = []
    for row in firsts:
        said = f"{named(row)}: {math.log(row.perplexity or math.inf):.4f} nats a token"
        gap = paired_difference(paired(row, LIKELIHOOD), paired(firsts[0], LIKELIHOOD))
        if row is not firsts[0] and gap is not None:
            said += f", {with_error(*gap)} behind"
        lines.append(said)
    return tuple(lines)


def _lost(rungs: Sequence[RungReached], trials: Mapping[str, TrialAdded], plan: Plan) -> tuple[str, ...]:
    """Return lines about the proposed students that are below the planned tokens, those that came furthest first."""
    raced = [one for one in rungs if one.judged and trials[one.trial].number is not None]
    last = {one.trial: one for one in sorted(raced, key=lambda one: one.rung)}
    lines = []
    for one in sorted(last.values(), key=lambda one: (-one.rung, one.judged)):
        if one.tokens < plan.tokens:
            best = min(other.judged or math.inf for other in raced if other.rung == one.rung)
            loss, least = math.log(one.judged or math.inf), math.log(best)
            said = f"{trials[one.trial].name}: {loss:.4f} nats a token after {one.tokens:,} tokens"
            lines.append(f"{said}; the best there had {least:.4f}")
    return tuple(lines)


def _objectives(asked: Mapping[str, Any]) -> tuple[Objective, ...]:
    """Return the search's objectives. The first one's direction is stored in its own field of `search.json`."""
    first, *others = objectives_of(asked)
    return (replace(first, direction=asked["direction"]), *others)


def _results(points: Mapping[str, Mapping[str, Any]], rungs: Iterable[RungReached], place: int) -> list[Observation]:
    """Return the values that trials reported for one objective, given its index among all objectives."""
    found = []
    for event in rungs:
        value = [event.value, *event.further][place : place + 1]
        if value and value[0] is not None:
            point = points[event.trial]
            found.append(Observation(point=point, state=Status.COMPLETED, value=value[0], fidelity=1.0))
    return found


def _table(objective: str, found: Importance) -> list[str]:
    if not found.shares:
        return [found.lack(objective)]
    lines = [f"What mattered for {objective}, in {found.results} trials at the first rung (PED-ANOVA):"]
    for path, item in found.shares.items():
        under = "" if item.trials == found.results else f", among the {item.trials} trials that have it"
        lines.append(f"  {item.share:6.1%}  {path}{under}")
    return lines + [f"     --   {path}: {why}" for path, why in found.left_out.items()]


def _ended(ends: Iterable[TrialEnded], status: Status) -> tuple[Ended, ...]:
    """Return the trials that ended with this status, grouped by cause, the largest group first.

    The cause is the missed limit or the failure, or else the reported reason without its figures.
    """
    groups: dict[str, list[tuple[float, str]]] = {}
    for event in ends:
        if event.status is status:
            reason, miss = str(event.reason), event.miss
            cause = _CAUSES[miss["limit"]] if miss else event.cause or _FIGURE.sub("…", reason)
            groups.setdefault(cause, []).append((miss["slack"] if miss else math.inf, reason))
    found = []
    for cause, members in groups.items():
        slack, said = min(members, key=lambda member: member[0])
        alike = len({reason for _, reason in members}) == 1
        found.append(Ended(cause=cause, count=len(members), said=said, nearest=math.isfinite(slack), alike=alike))
    return tuple(sorted(found, key=lambda ended: -ended.count))


def _limits(asked: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, tuple[str, ...]]:
    """Return a sentence about the limit and the best row, and sentences about better rows that exceed a limit."""
    limit = asked["budget"]["memory_bytes"]
    held = [row for row in rows if row.split == "validation" and row.memory_bytes]
    judged = [row for row in held if row.full]
    full = contenders(judged)
    beyond = least_beyond(full)
    students = [row for row in full if row.kind in DISTILLED]
    only = students_only(asked)
    # If no trial reached the end of the plan, the exported student did not either.
    exported = (asked.get("exported") or {}).get("row_id")
    unfinished = next((row for row in held if row.row_id == exported and not row.full), None)
    best = unfinished or chosen(judged, asked["metric"], asked["direction"], students_only=only)
    if best is not None and corrected(best, beyond) > limit:
        # Memory measured in the runtime for an exported row corrects rows whose memory was only predicted.
        usable = (*DISTILLED, *UNTRAINED)
        fitting = [row for row in judged if row.kind not in usable or corrected(row, beyond) <= limit]
        best = chosen(fitting, asked["metric"], asked["direction"], students_only=only)
    if best is None:
        if not students:
            return "No student has been trained to the end yet.", ()
        least = min(students, key=lambda row: corrected(row, beyond))
        short = corrected(least, beyond) - limit
        if short <= 0:
            return f"Nothing fits: {least.name} as {least.deployment_name} is not allowed ({least.reason}).", ()
        return f"Nothing fits {format_bytes(limit)}: the nearest needs {format_bytes(short)} more.", ()
    need, used = format_bytes(corrected(best, beyond)), corrected(best, beyond) / limit
    binding = f"The best, {named(best)}, needs {need}"
    if limit >= NO_LIMIT:
        binding += ": there is no memory limit."
    else:
        binding += f" of {format_bytes(limit)} ({used:.0%})"
        binding += f": memory {'limits' if used > 0.9 else 'does not limit'} the choice."
    sign = 1 if asked["direction"] == "max" else -1
    best_value = best.figure(asked["metric"])
    out = [row for row in full if not (row.feasible or row.reason in WITHIN_LIMITS) or corrected(row, beyond) > limit]
    beaten = [
        row
        for row in out
        if (value := row.figure(asked["metric"])) is not None
        and best_value is not None
        and sign * value > sign * best_value
    ]
    nearest = sorted(beaten, key=lambda row: corrected(row, beyond))[:3]
    # A row that was passed over for memory may fit after the correction by another student's measured memory.
    if any(corrected(row, beyond) <= limit and (row.reason or "").startswith("latency") for row in beaten):
        binding += " A latency limit excludes better rows."
    better = [
        f"{_wanting(row, corrected(row, beyond) - limit)} {row.name} as {row.deployment_name}: {asked['metric']} "
        f"{row.figure(asked['metric']):.4f} instead of {best_value:.4f}{_packed_smaller(row, asked, beyond)}."
        for row in nearest
    ]
    return binding, (*better, *_packed_larger(best, full, asked, beyond))


def _fits(row: Row, asked: Mapping[str, Any], beyond: Mapping[str, int]) -> list[tuple[Deployment, int, bool]]:
    """Return each deployment of the space for a row's student, its memory in bytes, and whether it fits the budget."""
    if row.shape is None:
        return []
    spec, budget = spec_from_config(row.shape), read_budget(asked["budget"])
    deployments = Space.stored(asked["space_definition"]).deployments
    found = []
    for fit in fits(spec, holdable(spec, deployments), budget):
        need = fit.need + beyond.get(fit.deployment.runtime, 0)
        found.append((fit.deployment, need, fit.slack <= 0 and need <= budget.memory_bytes))
    return found


def _packed_smaller(row: Row, asked: Mapping[str, Any], beyond: Mapping[str, int]) -> str:
    """Name the largest other deployment in which a row's student fits the budget. Empty if there is none."""
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
    """Say how much more memory the best student needs for its next larger deployment that was not evaluated.

    Empty if every deployment over the limit was evaluated.
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
        f"{format_bytes(need - limit)} more would hold the best as {name}, which was not evaluated because it does not "
        "fit.",
    )


def _wanting(row: Row, over: int) -> str:
    """Return what keeps a row out: the missing bytes, or the limit that its reason names."""
    return f"{format_bytes(over)} more would hold" if over > 0 else f"({row.reason}) keeps out"
