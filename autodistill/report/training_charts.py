"""Charts of a run's training: learning curves and where trials ended, figures at rungs, and seconds by phase."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError
from autodistill.report.charts import HEIGHT, WIDTH, altair_module
from autodistill.runs.events import RunEvent, RungReached, TrialAdded, TrialEnded, of_kind

if TYPE_CHECKING:
    import altair

MOST_CURVES = 30
"""Most trials whose curves are drawn. If there are more, those that reached the most tokens are drawn."""
_COLORED = 10  # trials that colors still tell apart
_BAR = 26
_ENDS = {"completed": "circle", "stopped": "cross", "failed": "triangle-down", "under way": "triangle-right"}


def learning(events: Sequence[RunEvent]) -> altair.LayerChart:
    """Draw the training loss of each trial by its tokens, with a mark that says how the trial ended.

    The loss is the cross-entropy to the text if steps have it, since all strategies share it. Else it is the loss that
    was minimised.

    Args:
        events: The log of a run.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: No trial has reached a rung.
    """
    alt = altair_module()
    curves, _ = _trials(events)
    points = [
        {"trial": trial, "tokens": step["tokens"], "loss": loss}
        for trial, rungs in curves.items()
        for rung in rungs
        for step in rung.steps
        if (loss := _loss(step)) is not None and "tokens" in step
    ]
    if not points:
        raise InputError("no trial has reached a rung, so that there is no learning curve yet")
    y = alt.Y("loss:Q", title="training loss (nats a token)", scale=alt.Scale(zero=False, padding=12))
    return _curves(alt, events, curves, points, y, "training loss", 0.8)


def rungs(events: Sequence[RunEvent], metric: str) -> altair.LayerChart:
    """Draw the metric on held-out text at each rung that a trial reached, joined by trial.

    Args:
        events: The log of a run.
        metric: Name of the metric.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: No trial has a figure at a rung.
    """
    alt = altair_module()
    curves, names = _trials(events)
    points = [
        {"trial": trial, "name": names[trial], "tokens": rung.tokens, "value": rung.value}
        for trial, reached in curves.items()
        for rung in reached
        if rung.value is not None
    ]
    if not points:
        raise InputError(f"no trial has {metric} at a rung")
    y = alt.Y("value:Q", title=f"{metric} at the rung", scale=alt.Scale(zero=False, padding=20))
    return _curves(alt, events, curves, points, y, f"{metric} at rungs", 0.6)


def _curves(
    alt: Any,
    events: Sequence[RunEvent],
    trials: Collection[str],
    points: Sequence[Mapping[str, Any]],
    y: altair.Y,
    title: str,
    opacity: float,
) -> altair.LayerChart:
    """Return a curve of each trial by its tokens, with a mark that says how the trial ended."""
    ends = [{**_end(events, trial), **last} for trial in trials if (last := _last(points, trial))]
    x = alt.X("tokens:Q", title="training tokens", scale=alt.Scale(zero=True))
    color = _color(alt, list(trials))
    lines = (
        alt.Chart(alt.Data(values=points)).mark_line(opacity=opacity).encode(x=x, y=y, color=color, detail="trial:N")
    )
    chart: altair.LayerChart = alt.layer(lines, _marks(alt, ends, x, y, color))
    return chart.properties(title=title, width=WIDTH, height=HEIGHT)


def phases(seconds: Mapping[str, float]) -> altair.Chart:
    """Draw the seconds that each phase of a search took.

    Args:
        seconds: Seconds by phase. "total" is left out.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: There are no phases.
    """
    alt = altair_module()
    bars = [{"phase": name, "seconds": round(value, 1)} for name, value in seconds.items() if name != "total"]
    if not bars:
        raise InputError("the run does not say how long its phases took")
    chart: altair.Chart = (
        alt.Chart(alt.Data(values=bars))
        .mark_bar()
        .encode(
            x=alt.X("seconds:Q", title="seconds"),
            y=alt.Y("phase:N", title=None, sort=[bar["phase"] for bar in bars]),
            tooltip=[alt.Tooltip("phase:N"), alt.Tooltip("seconds:Q", format=",.1f")],
        )
        .properties(title="seconds by phase", width=WIDTH, height=_BAR * len(bars))
    )
    return chart


def _trials(events: Sequence[RunEvent]) -> tuple[dict[str, list[RungReached]], dict[str, str]]:
    """Return the rungs of each drawn trial, ordered by tokens, and the names of all trials that reached a rung."""
    reached: dict[str, list[RungReached]] = {}
    for rung in of_kind(events, RungReached):
        reached.setdefault(rung.trial, []).append(rung)
    names = {trial.trial: trial.name for trial in of_kind(events, TrialAdded)}
    furthest = sorted(reached, key=lambda trial: -max(rung.tokens for rung in reached[trial]))[:MOST_CURVES]
    kept = {trial: sorted(found, key=lambda rung: rung.tokens) for trial, found in reached.items() if trial in furthest}
    return kept, {trial: names.get(trial, trial) for trial in reached}


def _loss(step: Mapping[str, Any]) -> float | None:
    return step.get("cross_entropy", step.get("loss"))


def _last(points: Sequence[Mapping[str, Any]], trial: str) -> dict[str, Any]:
    own = [point for point in points if point["trial"] == trial]
    return dict(max(own, key=lambda point: point["tokens"])) if own else {}


def _end(events: Sequence[RunEvent], trial: str) -> dict[str, Any]:
    """Return how a trial ended, in a word, and why."""
    names = {added.trial: added.name for added in of_kind(events, TrialAdded)}
    last = next((end for end in reversed(of_kind(events, TrialEnded)) if end.trial == trial), None)
    ended, why = ("under way", "") if last is None else (last.status.value, last.reason or "")
    return {"trial": trial, "name": names.get(trial, trial), "ended": ended, "why": why}


def _marks(alt: Any, ends: Sequence[Mapping[str, Any]], x: Any, y: Any, color: Any) -> Any:
    here = [name for name in _ENDS if any(end["ended"] == name for end in ends)]
    here += sorted({end["ended"] for end in ends} - set(here))
    shapes = [_ENDS.get(name, "square") for name in here]
    hover = [alt.Tooltip("trial:N"), alt.Tooltip("name:N"), alt.Tooltip("tokens:Q", format=",")]
    return (
        alt.Chart(alt.Data(values=ends))
        .mark_point(filled=True, size=80)
        .encode(
            x=x,
            y=y,
            color=color,
            shape=alt.Shape("ended:N", title=None, scale=alt.Scale(domain=here, range=shapes)),
            tooltip=[*hover, alt.Tooltip(y.shorthand, format=".4f"), alt.Tooltip("ended:N"), alt.Tooltip("why:N")],
        )
    )


def _color(alt: Any, trials: Sequence[str]) -> Any:
    """Return a color for each trial, or one color for all if there are too many to tell apart."""
    if len(trials) > _COLORED:
        return alt.value("#3987d6")
    return alt.Color("trial:N", title=None, scale=alt.Scale(domain=list(trials), scheme="tableau10"))
