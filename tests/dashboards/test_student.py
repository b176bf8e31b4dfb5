"""A bundle's files for Prometheus and Grafana, tried with the real Prometheus on a served student."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from autodistill.bundle.write import write_bundle
from autodistill.dashboards.grafana import dashboard
from autodistill.dashboards.search import PANELS
from tests.bundle.conftest import BUDGET, PROMISE, free_port, served
from tests.bundle.test_bundle import changed, docker_command, smoke
from tests.dashboards.conftest import prometheus, until

LIMITS = [
    {"quantity": "ttft", "percentile": 95, "seconds": 0.3, "streams": 1, "prompt": 512},
    {"quantity": "tpot", "percentile": 99, "seconds": 0.05, "streams": 1, "prompt": None},
]


@pytest.fixture
def bundle(gguf: Path, tmp_path: Path) -> Path:
    """A bundle that promised 300 ms to the first token and 50 ms for each later one."""
    write_bundle(changed(gguf, tmp_path / "export", promise=PROMISE | {"latency": LIMITS}), tmp_path / "bundle")
    return tmp_path / "bundle"


class Monitor:
    """Reports what `autodistill monitor` reports, with figures that a test sets."""

    def __init__(self) -> None:
        self.first, self.later, self.memory = 0.1, 0.02, 150e6

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        for name, value in (("first_token", self.first), ("token", self.later)):
            found = Metric(f"autodistill_{name}_seconds", "Time.", "summary")
            for quantile in ("0.5", "0.95", "0.99"):
                found.add_sample(found.name, {"quantile": quantile}, value)
            yield found
        yield GaugeMetricFamily("autodistill_memory_bytes", "Memory.", self.memory)
        kept = GaugeMetricFamily("autodistill_promise_kept", "Kept.", labels=["figure"])
        kept.add_metric(["ttft_p95"], float(self.first <= 0.3))
        kept.add_metric(["memory"], float(self.memory <= BUDGET))
        yield kept


def queries(shown: dict[str, Any]) -> dict[str, str]:
    """Return every expression of a dashboard, by panel and line."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in shown["panels"]
        for target in panel["targets"]
    }


def test_a_dashboard_has_panels_that_do_not_overlap_and_asks_for_a_source() -> None:
    shown = dashboard("uid", "title", PANELS)
    places = [panel["gridPos"] for panel in shown["panels"]]
    assert len({(one["x"], one["y"]) for one in places}) == len(PANELS)
    assert all(one["x"] + one["w"] <= 24 for one in places)
    assert len({panel["id"] for panel in shown["panels"]}) == len(PANELS)
    (source,) = shown["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert json.loads(json.dumps(shown)) == shown


def test_a_limit_is_drawn_where_it_was_promised(bundle: Path) -> None:
    panels = {panel["title"]: panel for panel in json.loads((bundle / "dashboard.json").read_text())["panels"]}
    for title, limit in {"Time to the first token": 0.3, "Time per later token": 0.05, "Memory": BUDGET}.items():
        steps = panels[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert steps[-1] == {"color": "red", "value": limit}


def promtool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True)


@pytest.mark.system
def test_prometheus_own_check_finds_nothing(bundle: Path) -> None:
    (bundle / "api_key").write_text("key")
    for words in (("check", "config", "prometheus.yml"), ("check", "rules", "--lint-fatal", "alerts.yml")):
        done = promtool(bundle, *words)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.system
@pytest.mark.parametrize(
    ("series", "value", "alert", "minutes"),
    [
        ('up{job="student", instance="a"}', "0", "StudentDown", 2),
        ('autodistill_first_token_seconds{quantile="0.95", instance="a"}', "0.31", "FirstTokenLate", 3),
        ('autodistill_first_token_seconds{quantile="0.95", instance="a"}', "0.29", "", 30),
        ('autodistill_first_token_seconds{quantile="0.99", instance="a"}', "0.5", "", 30),
        ('autodistill_token_seconds{quantile="0.99", instance="a"}', "0.051", "TokensLate", 3),
        ('autodistill_memory_bytes{instance="a"}', str(BUDGET + 1), "MemoryOverBudget", 3),
        ('autodistill_memory_bytes{instance="a"}', str(BUDGET), "", 30),
        ('autodistill_promise_kept{figure="memory", instance="a"}', "0", "PromiseBroken", 3),
        ('autodistill_promise_kept{figure="memory", instance="a"}', "1", "", 30),
    ],
)
def test_an_alert_fires_where_a_figure_breaks_and_only_there(
    series: str, value: str, alert: str, minutes: int, bundle: Path
) -> None:
    """Check with promtool, which simulates the time.

    The series `up` is given because a missing monitor raises another alert.
    """
    names = [rule["alert"] for rule in yaml.safe_load((bundle / "alerts.yml").read_text())["groups"][0]["rules"]]
    up = {"series": 'up{job="monitor", instance="a"}', "values": "1x200"}
    quiet = [{"eval_time": f"{minutes}m", "alertname": name, "exp_alerts": []} for name in names if name != alert]
    firing = {
        "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
        "eval_time": f"{minutes}m",
        "exp_samples": [{"labels": "{}", "value": 1}],
    }
    case = {
        "interval": "15s",
        "input_series": [up, {"series": series, "values": f"{value}x200"}],
        "alert_rule_test": quiet,
        "promql_expr_test": [firing] if alert else [],
    }
    (bundle / "test.yml").write_text(
        yaml.safe_dump({"rule_files": ["alerts.yml"], "evaluation_interval": "15s", "tests": [case]})
    )
    done = promtool(bundle, "test", "rules", "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.system
def test_a_real_prometheus_scrapes_a_served_student_and_tells_that_its_promise_breaks(
    bundle: Path, tmp_path: Path
) -> None:
    key, port = bundle / "api_key", free_port()
    key.write_text("a-key-of-some-length\n")
    words = [word.replace("/model/", f"{bundle}/model/", 1) for word in docker_command(bundle)]
    for flag, value in {"--host": "127.0.0.1", "--port": str(port), "--api-key-file": str(key)}.items():
        words[words.index(flag) + 1] = value
    monitor, registry = Monitor(), CollectorRegistry()
    registry.register(monitor)  # type: ignore[arg-type]
    endpoint, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    config = yaml.safe_load((bundle / "prometheus.yml").read_text())
    for job, here in zip(config["scrape_configs"], (port, endpoint.server_port), strict=True):
        job["static_configs"] = [{"targets": [f"127.0.0.1:{here}"]}]
    # As they are, except for the minutes that an alert waits.
    alerts = yaml.safe_load((bundle / "alerts.yml").read_text())
    for rule in alerts["groups"][0]["rules"]:
        rule["for"] = "0s"
    (bundle / "alerts.yml").write_text(yaml.safe_dump(alerts))
    with served(words, tmp_path / "server.log"), prometheus(bundle, config, tmp_path / "prometheus.log") as found:
        assert smoke(bundle, f"http://127.0.0.1:{port}", key).returncode == 0
        assert until(lambda: {one["value"][1] for one in found.ask("up")} == {"1"} and len(found.ask("up")) == 2)
        asked = queries(json.loads((bundle / "dashboard.json").read_text()))
        assert until(lambda: all(found.ask(expr) for expr in asked.values())), {
            name: found.ask(expr) for name, expr in asked.items()
        }
        (written,) = found.ask("llamacpp:tokens_predicted_total")
        assert float(written["value"][1]) >= 24
        # Before the first scrape, alerts may say that nothing is monitored.
        assert until(lambda: not found.firing()), found.firing()
        monitor.first, monitor.memory = 0.4, BUDGET + 1e6
        broken = {"FirstTokenLate", "MemoryOverBudget", "PromiseBroken"}
        assert until(lambda: found.firing() == broken), found.firing()
        monitor.first, monitor.memory = 0.1, 150e6
        assert until(lambda: not found.firing())
    endpoint.shutdown()
    thread.join()
