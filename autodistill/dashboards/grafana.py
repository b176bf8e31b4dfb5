"""Panels as a Grafana dashboard, in the JSON that Grafana imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SCHEMA = 39  # version of Grafana 10.4, which later versions can read
_WIDTH, _HEIGHT = 12, 8  # size of a panel on a grid that is 24 wide
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """A chart over time.

    Attributes:
        title, about: What it shows, in a few words and in a sentence.
        unit: Unit by Grafana's name: "s", "bytes", "reqps", "percentunit", "short" and others.
        lines: Queries in Prometheus's language, by the name of the line. Names may contain labels as {{label}}.
        limit: Value at which a red line is drawn.
        least: Lowest value of the axis.
    """

    title: str
    about: str
    unit: str
    lines: Mapping[str, str]
    limit: float | None = None
    least: float | None = 0.0


def dashboard(uid: str, title: str, panels: Sequence[Panel]) -> dict[str, Any]:
    """Return a dashboard with two panels per row. The user who imports it chooses a data source.

    Args:
        uid: Its name in addresses: letters, digits, "-" and "_", at most 40 characters.
        title: Title for the user.
        panels: The panels in their order.
    """
    return {
        "uid": uid,
        "title": title,
        "tags": ["autodistill"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(place, panel) for place, panel in enumerate(panels)],
    }


def _panel(place: int, panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    style = "off"
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
        style = "line"
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "custom": {"thresholdsStyle": {"mode": style}},
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.least is not None:
        defaults["min"] = panel.least
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": place % 2 * _WIDTH, "y": place // 2 * _HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": _SOURCE, "expr": asked, "legendFormat": name}
            for number, (name, asked) in enumerate(panel.lines.items())
        ],
    }
