"""Ray's dashboard of a search opens in a browser past its token, and Prometheus finds the search's gauges in Ray."""

from __future__ import annotations

import stat
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from autodistill.cli.app import main
from autodistill.dashboards.prometheus import Job, scrape
from autodistill.errors import InputError, MissingDependencyError
from autodistill.objects.run import run_search
from autodistill.search.callbacks import Callback, RungReached
from autodistill.search.campaign.observer import Observer
from autodistill.search.runners.ray_dashboard import TOKEN_FILE, check_dashboard
from tests.dashboards.conftest import prometheus, until
from tests.report.test_page_in_browser import drive
from tests.search.conftest import untimed
from tests.search.small_search import small_inputs, small_request


class Told(Observer):
    """Records the addresses that the user is shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def address(self, about: str) -> str:
        (line,) = (line for line in self.lines if line.startswith(about))
        return next(word for word in line.split() if word.startswith("http://"))


class Looks(Callback):
    """Looks at the dashboard while the search waits at its first rung. The test judges what it finds."""

    def __init__(self, told: Told, folder: Path) -> None:
        self.told, self.folder, self.found = told, folder, {}  # type: ignore[var-annotated]

    def rung_reached(self, event: RungReached) -> None:
        if self.found:
            return
        self.found["error"] = "not all was looked at"
        page, metrics = self.told.address("Ray's dashboard"), self.told.address("Ray's own metrics")
        token = self.folder / "runs" / "run" / TOKEN_FILE
        self.found["mode"] = stat.S_IMODE(token.stat().st_mode)
        try:
            urllib.request.urlopen(f"{page}/nodes?view=summary", timeout=30)
        except urllib.error.HTTPError as error:
            self.found["without"] = error.code
        config = scrape([Job(name="ray", target=metrics.removeprefix("http://").removesuffix("/metrics"))])
        with prometheus(self.folder, config, self.folder / "log") as asked:
            wanted = "ray_autodistill_search_best"
            until(lambda: bool(asked.ask(wanted)), 60)
            self.found["best"] = {one["metric"]["of"]: float(one["value"][1]) for one in asked.ask(wanted)}
            self.found["budget"] = [float(one["value"][1]) for one in asked.ask("ray_autodistill_search_budget_bytes")]
        processes = (psutil.Process(), *psutil.Process().children(recursive=True))
        ports = [one for process in processes for one in process.net_connections("inet")]
        self.found["listening"] = {one.laddr.ip for one in ports if one.status == psutil.CONN_LISTEN}
        script = Path(__file__).with_name("ray_dashboard.mjs")
        try:
            self.found["page"] = drive(script, page, token.read_text().strip(), shots=self.folder / "shots")
        except pytest.skip.Exception as skipped:
            self.found["skipped"] = str(skipped)
        del self.found["error"]


@pytest.mark.system
def test_the_dashboard_opens_with_the_token_alone_and_ray_has_the_gauges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.dashboard.optional_deps", reason="Ray's dashboard is not installed (extra: dashboard)")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    told = Told()
    looks = Looks(told, tmp_path)
    with untimed():
        request = small_request(
            small_inputs(tmp_path), tmp_path / "runs", trials=2, runner="ray", dashboard=True, callbacks=(looks,)
        )
        run_search(request, told)
    found = looks.found
    assert "error" not in found, found
    assert (found["mode"], found["without"]) == (0o600, 401)
    assert set(found["best"]) == {"best", "untrained"}
    assert found["budget"] == [16e9]
    assert {ip.removeprefix("::ffff:") for ip in found["listening"]} <= {"127.0.0.1", "::1"}
    assert not (tmp_path / "runs" / "run" / TOKEN_FILE).exists()
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["page"]["elsewhere"] == []
    assert found["page"]["refused"] >= 2, "without a token, and with a wrong one"
    assert found["page"]["actors"].count("ALIVE") >= 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--runner inline", "--dashboard shows Ray, which --runner inline does not use: leave one of them out"),
        ("--ray-address auto", "names a cluster, which has a dashboard of its own: leave out --dashboard"),
    ],
)
def test_what_contradicts_a_dashboard_is_one_line(words: str, said: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["search", "--budget", "1GB", "--dashboard", *words.split(), "--runs", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "runs").exists()


def test_a_dashboard_that_is_not_installed_or_asks_for_no_token_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray.dashboard.optional_deps", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'autodistill-search\[dashboard\]'"):
        check_dashboard()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match="open to all users of this machine"):
        check_dashboard()
