"""Prometheus gets the gauges of a search, only on loopback, and without delaying the search."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from autodistill.cli.app import main
from autodistill.errors import InputError, MissingDependencyError
from autodistill.runs.run_folder import RunFolder
from autodistill.search.callbacks import SearchFinished, SearchStarted
from autodistill.search.gauges import SearchGauges
from autodistill.search.prometheus import Endpoint
from tests.search.test_gauges import RUN, cache_of


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    found = Endpoint(0, cache_of(tmp_path), 8_000_000_000)
    yield found
    found.close()


def scraped(endpoint: Endpoint) -> dict[tuple[str, ...], float]:
    """Return the endpoint's answer, read by prometheus-client's own parser: values by name and labels."""
    with urllib.request.urlopen(endpoint.url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_before_there_is_a_run_it_only_says_that_the_search_runs(endpoint: Endpoint) -> None:
    assert scraped(endpoint) == {("autodistill_search_running",): 1.0}


def test_what_it_serves_are_the_gauges(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.search_started(SearchStarted(run=RUN))
    gauges = SearchGauges(RunFolder(RUN.parent, RUN.name), tmp_path, 8_000_000_000)
    shown = {(one.name, *key): value for one in gauges.read() for key, value in one.values.items()}
    assert len(shown) == 15
    assert scraped(endpoint) == shown | {("autodistill_search_running",): 1.0}


def test_at_the_end_the_last_figures_stay(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.search_started(SearchStarted(run=RUN))
    endpoint.search_finished(SearchFinished(run=RUN, best=None, rows=()))  # type: ignore[arg-type]
    found = scraped(endpoint)
    assert found[("autodistill_search_running",)] == 0.0
    assert ("autodistill_search_best", "accuracy", "best") in found


def test_a_log_that_cannot_be_read_fails_the_scrape_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.search_started(SearchStarted(run=tmp_path / "gone"))
    with pytest.raises(urllib.error.HTTPError, match="500"):
        scraped(endpoint)


def test_only_this_machine_reaches_it(endpoint: Endpoint) -> None:
    assert endpoint._server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("command", ["search --budget 1GB", "distill logit_kd"])
def test_a_port_in_use_is_one_line_before_any_work(command: str, tmp_path: Path, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [*command.split(), "--metrics-port", str(port), "--runs", str(tmp_path / "runs")]
        assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    why = "cannot be listened on (Address already in use): stop the program that uses it, or give another port"
    assert said == [f"error: --metrics-port {port} {why}"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("budget", ["--budget 1GB", "--budgets 1GB,2GB"])
@pytest.mark.parametrize("watched", ["--metrics-port 0", "--dashboard"])
def test_a_plan_cannot_be_watched(watched: str, budget: str, capsys: Any) -> None:
    assert main(["search", *budget.split(), "--plan", *watched.split()]) == 2
    assert f"leave out --plan or {watched.split()[0]}" in capsys.readouterr().err


def test_a_port_that_is_none_and_a_package_that_is_missing_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="must be 0 to 65535, not 70000"):
        Endpoint(70_000, tmp_path, 1)
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'autodistill-search\[monitor\]'"):
        Endpoint(0, tmp_path, 1)
