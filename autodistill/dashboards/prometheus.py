"""The configuration of Prometheus: what it scrapes, and when it raises an alert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """A target that Prometheus scrapes.

    Attributes:
        name: Its label `job`.
        target: Host and port.
        key_file: File with the key for its requests, next to the configuration; "" for none.
    """

    name: str
    target: str
    key_file: str = ""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A rule by which Prometheus raises an alert.

    Attributes:
        name: Name of the alert, in camel case.
        expr: Condition in Prometheus's language, which is true while the alert is pending or fires.
        wait: How long the condition must hold, like "2m".
        summary: Message for the user, in one line.
    """

    name: str
    expr: str
    wait: str
    summary: str


def scrape(jobs: Sequence[Job], rules: str = "") -> dict[str, Any]:
    """Return the content of `prometheus.yml`.

    Args:
        jobs: The targets to scrape.
        rules: Name of the file of alerts next to it; "" for none.
    """
    found: dict[str, Any] = {"global": {"scrape_interval": "15s", "evaluation_interval": "15s"}}
    if rules:
        found["rule_files"] = [rules]
    configs = []
    for job in jobs:
        config: dict[str, Any] = {"job_name": job.name, "static_configs": [{"targets": [job.target]}]}
        if job.key_file:
            config["authorization"] = {"credentials_file": job.key_file}
        configs.append(config)
    return {**found, "scrape_configs": configs}


def rules(group: str, alerts: Sequence[Alert]) -> dict[str, Any]:
    """Return the content of a file of alerts."""
    found = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.wait,
            "labels": {"severity": "page"},
            "annotations": {"summary": alert.summary},
        }
        for alert in alerts
    ]
    return {"groups": [{"name": group, "rules": found}]}
