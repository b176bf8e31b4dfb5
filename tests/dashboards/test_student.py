"""A bundle's files for Prometheus and Grafana, tried with the real Prometheus on a served student."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

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


@pytest.fixture
def packed_bundle(packed: Path, tmp_path: Path) -> Path:
    """A bundle for vLLM, of the same promise."""
    promise = PROMISE | {"latency": LIMITS}
    write_bundle(changed(packed, tmp_path / "packed", promise=promise), tmp_path / "packed-bundle")
    return tmp_path / "packed-bundle"


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
@pytest.mark.parametrize("fixture", ["bundle", "packed_bundle"])
def test_prometheus_own_check_finds_nothing(fixture: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(fixture)
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


KEPT = [limit | {"seconds": 60.0, "prompt": None} for limit in LIMITS]


@contextmanager
def monitored(url: str, key: Path, promise: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `autodistill monitor` as a bundle's card says, only quicker, and stop it with Ctrl-C."""
    words = ["monitor", url, "--key-file", str(key), "--promise", str(promise), "--prometheus", str(port)]
    with log.open("wb") as said:
        command = [sys.executable, "-m", "autodistill", *words, "--every", "1s", "--window", "30s"]
        monitor = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        yield monitor
    finally:
        monitor.send_signal(signal.SIGINT)
        monitor.wait(60)


@pytest.mark.system
@pytest.mark.parametrize(
    ("promise", "alerts", "code"),
    [
        ({"latency": KEPT}, set(), 0),
        # No server writes a token in a microsecond, and none has a model in a megabyte.
        (
            {"latency": [KEPT[0], KEPT[1] | {"seconds": 1e-6}], "memory_bytes": 10**6},
            {"TokensLate", "MemoryOverBudget", "PromiseBroken"},
            4,
        ),
    ],
    ids=["kept", "broken"],
)
def test_a_real_prometheus_and_the_real_monitor_tell_whether_a_served_student_keeps_its_promise(
    promise: dict[str, Any], alerts: set[str], code: int, gguf: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    write_bundle(changed(gguf, tmp_path / "export", promise=PROMISE | promise), bundle)
    key, port = bundle / "api_key", free_port()
    key.write_text("a-key-of-some-length\n")
    url = f"http://127.0.0.1:{port}"
    words = [word.replace("/model/", f"{bundle}/model/", 1) for word in docker_command(bundle)]
    for flag, value in {"--host": "127.0.0.1", "--port": str(port), "--api-key-file": str(key)}.items():
        words[words.index(flag) + 1] = value
    # As they are, except for the minutes that an alert waits.
    written = yaml.safe_load((bundle / "alerts.yml").read_text())
    for rule in written["groups"][0]["rules"]:
        rule["for"] = "0s"
    (bundle / "alerts.yml").write_text(yaml.safe_dump(written))
    asked = queries(json.loads((bundle / "dashboard.json").read_text()))
    config = yaml.safe_load((bundle / "prometheus.yml").read_text())
    endpoint = free_port()
    for job, here in zip(config["scrape_configs"], (port, endpoint), strict=True):
        job["static_configs"] = [{"targets": [f"127.0.0.1:{here}"]}]
    with served(words, tmp_path / "server.log"):
        assert smoke(bundle, url, key).returncode == 0
        with (
            monitored(url, key, bundle / "model", endpoint, tmp_path / "monitor.log") as monitor,
            prometheus(bundle, config, tmp_path / "prometheus.log") as found,
        ):
            assert until(lambda: {one["value"][1] for one in found.ask("up")} == {"1"} and len(found.ask("up")) == 2)
            assert until(lambda: all(found.ask(expr) for expr in asked.values())), {
                name: found.ask(expr) for name, expr in asked.items()
            }
            (tokens,) = found.ask("llamacpp:tokens_predicted_total")
            assert float(tokens["value"][1]) >= 24
            # Before the first scrape, an alert may say that nothing is monitored.
            assert until(lambda: found.firing() == alerts), found.firing()
            kept = {one["metric"]["figure"]: one["value"][1] for one in found.ask("autodistill_promise_kept")}
            broken = "0" if alerts else "1"
            assert kept == {"answers": "1", "ttft_p95": "1", "tpot_p99": broken, "memory": broken}
        assert monitor.returncode == code, (tmp_path / "monitor.log").read_text()
