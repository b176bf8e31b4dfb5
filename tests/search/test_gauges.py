"""The gauges of a search are what its log says, on loopback alone, and never in the way of the search."""

from __future__ import annotations

import json
import math
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from autodistill.cli.app import main
from autodistill.errors import InputError, MissingDependencyError
from autodistill.search.callbacks import SearchFinished, SearchStarted
from autodistill.search.gauges import SearchGauges

RUN = Path(__file__).parents[2] / "results" / "reference" / "search-20261128-114135"
EVENTS = [json.loads(line) for line in (RUN / "trials.jsonl").read_text().splitlines()]


@pytest.fixture
def gauges(tmp_path: Path) -> Iterator[SearchGauges]:
    (tmp_path / "teacher-outputs" / "one").mkdir(parents=True)
    (tmp_path / "teacher-outputs" / "one" / "outputs.arrow").write_bytes(b"x" * 12_345)
    found = SearchGauges(0, tmp_path, 8_000_000_000)
    yield found
    found.close()


def scraped(gauges: SearchGauges) -> dict[tuple[str, ...], float]:
    """What the endpoint answers, read by prometheus-client's own parser: values by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{gauges.port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_before_there_is_a_run_it_only_says_that_the_search_runs(gauges: SearchGauges) -> None:
    assert scraped(gauges) == {("autodistill_search_running",): 1.0}


def test_a_run_is_shown_as_its_log_has_it(gauges: SearchGauges) -> None:
    gauges.search_started(SearchStarted(run=RUN))
    found = {
        key[0].removeprefix("autodistill_search_"): value for key, value in scraped(gauges).items() if len(key) == 1
    }
    rungs = [event for event in EVENTS if event["event"] == "rung"]
    rows = {event["row"]["row_id"]: event["row"] for event in EVENTS if event["event"] == "row"}
    best = rows["t001xx-gguf-q4_1"]  # the first of the table in the README
    trained, seconds = sum(rung["trained"] for rung in rungs), sum(rung["seconds"]["train"] for rung in rungs)
    longer = sum(rung["seconds"]["train"] for rung in rungs if rung["trial"] in ("t001x", "t001xx"))
    assert found == {
        "running": 1.0,
        "best_nll_nats": pytest.approx(math.log(best["perplexity"])),
        "best_memory_bytes": best["memory_bytes"],
        "budget_bytes": 16e9,
        "trained_tokens": trained,
        "tokens_per_second": pytest.approx(trained / seconds * 2),
        "final_student_share": pytest.approx(longer / 600),
        "cache_bytes": 12_345,
        "cache_limit_bytes": 8e9,
    }
    labelled = {key[1:]: value for key, value in scraped(gauges).items() if len(key) > 1}
    assert labelled[("accuracy", "best")] == best["accuracy"]
    assert labelled[("accuracy", "untrained")] == rows["teacher-gguf-q4_1"]["accuracy"]
    states = {key[0]: value for key, value in labelled.items() if len(key) == 1}
    assert states == {"running": 0, "completed": 5, "stopped": 0, "rejected": 0, "failed": 0}


def test_at_the_end_the_last_figures_stay(gauges: SearchGauges, monkeypatch: pytest.MonkeyPatch) -> None:
    gauges.search_started(SearchStarted(run=RUN))
    gauges.search_finished(SearchFinished(run=RUN, best=None, rows=()))  # type: ignore[arg-type]
    found = scraped(gauges)
    assert found[("autodistill_search_running",)] == 0.0
    assert ("autodistill_search_best", "accuracy", "best") in found


def test_a_log_that_cannot_be_read_fails_the_scrape_alone(gauges: SearchGauges, tmp_path: Path) -> None:
    gauges.search_started(SearchStarted(run=tmp_path / "gone"))
    with pytest.raises(urllib.error.HTTPError, match="500"):
        scraped(gauges)


def test_only_this_machine_reaches_it(gauges: SearchGauges) -> None:
    assert gauges._server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("command", ["search --budget 1GB", "distill logit_kd"])
def test_a_port_in_use_is_one_line_before_any_work(command: str, tmp_path: Path, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [*command.split(), "--metrics-port", str(port), "--out", str(tmp_path / "runs")]
        assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    why = "cannot be listened on (Address already in use): stop what does, or give another port"
    assert said == [f"error: --metrics-port {port} {why}"]
    assert not (tmp_path / "runs").exists()


def test_a_plan_has_no_gauges(capsys: Any) -> None:
    assert main(["search", "--budget", "1GB", "--plan", "--metrics-port", "0"]) == 2
    assert "leave out --plan or --metrics-port" in capsys.readouterr().err


def test_a_port_that_is_none_and_a_package_that_is_missing_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="must be 0 to 65535, not 70000"):
        SearchGauges(70_000, tmp_path, 1)
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'autodistill-search\[monitor\]'"):
        SearchGauges(0, tmp_path, 1)
