"""`autodistill dashboards`, and a real Prometheus that scrapes a real search."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from autodistill.bundle.sums import check_sums
from autodistill.bundle.write import write_bundle
from autodistill.cli.app import main
from autodistill.objects.run import run_search
from autodistill.search.callbacks import Callback, SearchFinished
from autodistill.search.campaign.observer import Observer
from tests.bundle.conftest import free_port
from tests.dashboards.conftest import prometheus, until
from tests.dashboards.test_student import promtool, queries
from tests.search.conftest import untimed
from tests.search.small_search import small_inputs, small_request


def test_it_writes_what_prometheus_and_grafana_read(tmp_path: Path, capsys: Any) -> None:
    assert main(["dashboards", "--out", str(tmp_path / "out"), "--port", "9001"]) == 0
    assert capsys.readouterr().out.split() == [
        *("grafana:", str(tmp_path / "out" / "search.json"), "prometheus:", str(tmp_path / "out" / "prometheus.yml"))
    ]
    config = yaml.safe_load((tmp_path / "out" / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["127.0.0.1:9001"]}]
    assert len(queries(json.loads((tmp_path / "out" / "search.json").read_text()))) == 10


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--out", "full"], "exists: name another folder"), (["--out", "new", "--port", "0"], "must be 1 to 65535")],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/prometheus.yml").touch()
    assert main(["dashboards", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert [path.name for path in tmp_path.rglob("*.*")] == ["prometheus.yml"]


@pytest.mark.system
def test_prometheus_own_check_finds_nothing(tmp_path: Path) -> None:
    assert main(["dashboards", "--out", str(tmp_path)]) == 0
    done = promtool(tmp_path, "check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


class Lingers(Callback):
    """Holds the search at its end until it has been scraped."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def search_finished(self, event: SearchFinished) -> None:
        self.seen.wait(60)


@pytest.mark.system
def test_a_real_prometheus_scrapes_a_real_search_and_every_panel_has_data(tmp_path: Path) -> None:
    port, lingers = free_port(), Lingers()
    assert main(["dashboards", "--out", str(tmp_path / "shown"), "--port", str(port)]) == 0
    config = yaml.safe_load((tmp_path / "shown" / "prometheus.yml").read_text())
    asked = queries(json.loads((tmp_path / "shown" / "search.json").read_text()))
    request = small_request(
        small_inputs(tmp_path), tmp_path / "runs", trials=2, metrics_port=port, callbacks=(lingers,)
    )
    with prometheus(tmp_path / "shown", config, tmp_path / "log") as found, untimed():
        results: list[Any] = []
        search = threading.Thread(target=lambda: results.append(run_search(request, Observer())))
        search.start()
        began = time.monotonic()
        try:
            assert until(lambda: bool(found.ask("autodistill_search_running == 1")))
            assert until(lambda: all(found.ask(expr) for expr in asked.values()), 200), {
                name: found.ask(expr) for name, expr in asked.items()
            }
            done = 'autodistill_search_trials{state="completed"} == 2'
            assert until(lambda: bool(found.ask(done)), 200), time.monotonic() - began
            (best,) = found.ask('autodistill_search_best{of="best"}')
        finally:
            lingers.seen.set()
            search.join()
    # The result of the search is bundled as it is.
    found_bundle = write_bundle(results[0].path / "student" / "gguf", tmp_path / "bundle")
    assert (found_bundle["runtime"], check_sums(tmp_path / "bundle").other_files) == ("llama.cpp", ())
    assert len(json.loads((tmp_path / "bundle" / "answers.json").read_text())["questions"]) == 24
    assert float(best["value"][1]) == pytest.approx(results[0].best.metrics["accuracy"].value)
